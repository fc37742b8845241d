"""Serve a page and an interface that search in a data base, of embed.py or of a run.

    python serve.py --data_base museum.pth                        # http://127.0.0.1:8000
    python serve.py --data_base RUN_data_base.pth --data_path /home/data --port 8080
    python serve.py --data_base museum.pth --host 0.0.0.0 --token WORD    # for others too
    python serve.py --qdrant http://localhost:6333 --collection museum --model results/RUN_model.pth

    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/search?k=5'
    curl --json '{"path": "birds/0.jpg", "k": 5}' http://127.0.0.1:8000/search

The page: drop, paste, choose or photograph a picture; press a result to search on with it. Only this machine sees it
unless --host says otherwise. What is sent stays in memory; images are served by their number in the data base, never by
a path. Requests that arrive together are embedded and searched as one batch; SIGTERM ends it after those at hand.
"""
import asyncio
import hashlib
import html
import io
import json
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import lru_cache
from pathlib import Path

from engine.errors import Unreachable, UserError
from utils import Parser, check_between, check_place, refuse_without_effect, run_script, user_path

MOST_BYTES = 20 * 10**6  # of an upload
MOST_JSON = 10**4  # bytes
MOST_FOUND, FOUND = 200, 24  # images in an answer
MOST_NAMED = 60  # images that a text finds
THUMBNAIL, QUALITY, KEPT = 320, 80, 4096  # px, of JPEG, thumbnails in memory
TEMPLATE = Path(__file__).parent / 'templates' / 'serve.html'
HEADERS = {'Content-Security-Policy': "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src "
           "'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
           'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer'}


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('--data_base', type=user_path, metavar='FILE', help='file, or its name in --results_dir')
    parser.add_argument('--qdrant', metavar='URL', help='in place of --data_base: a Qdrant server, or the folder of '
                        'its embedded mode')
    parser.add_argument('--collection', metavar='NAME', help='of --qdrant')
    parser.add_argument('--model', type=user_path, metavar='FILE', help='of --qdrant: what embedded the collection; '
                        'without it only images of the collection can be searched for')
    parser.add_argument('--data_path', type=user_path, default='/home/data', help='folder that holds the data set of a '
                        'run; what embed.py made knows its own folders [%(default)s]')
    parser.add_argument('--results_dir', type=user_path, default='results', help='where data bases are [%(default)s]')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at; 0.0.0.0: all of this machine, so '
                        'that others see the page [%(default)s]')
    parser.add_argument('--port', type=int, default=8000, help='0: a free one [%(default)s]')
    parser.add_argument('--token', metavar='WORD', help='asked of everybody: as /?token=WORD once in a browser, or as '
                        'the header Authorization: Bearer WORD')
    parser.add_argument('--device', default='auto', help='to embed what is sent [%(default)s]')
    args = parser.parse_args(argv)
    check_between(args, {'port': (0, 65535)})
    check_place(args)
    refuse_without_effect(args, {'model': '' if args.qdrant else ' with --data_base, beside which it lies'})
    if args.token is not None and (len(args.token) < 8 or not args.token.isascii() or not args.token.isprintable()):
        raise UserError('--token must be 8 or more ASCII letters, digits or signs')
    return args


if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    ARGS = run_script(get_args)

from browse import ABSENT
from engine.files import image_file
from engine.images import BrokenImage, load_image
from searching import Query, Refused, Searcher, open_searcher


# ---------------------------------------------------- interface ----------------------------------------------------
def thumbnail_of(item) -> bytes:
    """Return an image as JPEG of THUMBNAIL px at most; raises Refused where it is missing, or leads out of its folder.
    """
    try:
        image = load_image(image_file(Path(item.folder), item.path))
    except (BrokenImage, UserError):
        raise Refused(404, 'the image is missing or broken') from None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=QUALITY)
    return buffer.getvalue()


async def read_body(request, most: int) -> bytes:
    """Read what a request sends; raises Refused as soon as it is too much."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise Refused(413, f'more than {most:,} bytes; send a smaller picture')
    return bytes(body)


def whole_number(value, name: str, low: int, high: int, default: int) -> int:
    """Return a number of a request, or its default; raises Refused where it is none in range."""
    try:
        number = default if value is None else int(value)
    except (ValueError, TypeError, OverflowError):
        number = low - 1
    if isinstance(value, (bool, float)) or not low <= number <= high:
        raise Refused(422, f'{name} must be a whole number from {low} to {high}')
    return number


def truth(value) -> bool:
    """Return a switch of a request; raises Refused where it is none."""
    if value in (None, False, True, '0', '1', 'true', 'false'):
        return value in (True, '1', 'true')
    raise Refused(422, 'binary must be true or false')


class Interface:
    """What the addresses of the server answer."""

    def __init__(self, searcher: Searcher, title: str):
        self.searcher, self.collection, self.title = searcher, searcher.collection, title
        self.thumbnail = lru_cache(KEPT)(lambda number: thumbnail_of(self.collection.item(number)))

    def describe(self, number: int, similarity: float | None = None) -> dict:
        """Return what is said of an image."""
        item = self.collection.item(number)
        found = {'image': str(number), 'url': f'images/{number}?v={self.version_of(number)}', 'path': item.path,
                 'class': item.label or None}
        return found if similarity is None else {**found, 'similarity': similarity}

    def version_of(self, number: int | str) -> str:
        """Return a part of an image's address, by which a browser keeps it until the number is that of another one."""
        return hashlib.sha256(repr(self.collection.item(int(number))).encode()).hexdigest()[:12]

    def item_number(self, value) -> int:
        """Return the number of an image of the collection; raises Refused where there is none."""
        try:
            number = int(str(value))
            self.collection.item(number)
        except Unreachable:
            raise
        except (ValueError, IndexError):
            raise Refused(404, f'there is no image {str(value)[:40]!r}') from None
        return number

    async def search(self, request) -> dict:
        """Search with the picture in the body, or as its JSON says."""
        if request.headers.get('content-type', '').split(';')[0].strip() == 'application/json':
            try:
                asked = json.loads(await read_body(request, MOST_JSON))
            except ValueError:
                asked = None
            if not isinstance(asked, dict) or ('path' in asked) == ('image' in asked):
                raise Refused(422, 'the JSON must be {"path": ...} or {"image": ...}, and k and binary if you like')
        else:
            asked = dict(request.query_params)
            if asked.keys() & {'path', 'image'}:
                raise Refused(422, 'path and image are asked for as JSON')
        number = whole_number(asked.get('k'), 'k', 1, MOST_FOUND, FOUND)
        binary, itself, query = truth(asked.get('binary')), None, None
        if binary and not self.collection.ranks_codes:
            raise Refused(422, 'this collection ranks by cosine alone; leave binary out')
        if 'path' in asked or 'image' in asked:
            itself = self.item_number(asked['image']) if 'image' in asked else self.collection.number_of(
                str(asked['path']))
            if itself is None:
                raise Refused(404, f'no image, or more than one, has the path {str(asked["path"])[:200]!r}')
            query = Query(None, self.collection.feature(itself), number + 1, binary)
        else:
            data = await read_body(request, MOST_BYTES)
            if self.searcher.model is None:
                raise Refused(409, 'the model is not there, so that only images of the collection can be searched for')
            try:
                query = Query(await self.searcher.decode(data), None, number, binary)
            except BrokenImage as error:
                reason = 'of no format that is known' if 'cannot identify' in str(error) else str(error)
                raise Refused(415, f'this is no picture that can be read ({reason})') from None
        found = [pair for pair in await self.searcher.search(query) if pair[0] != itself][:number]
        limit = None if binary else self.searcher.threshold
        return {'query': None if itself is None else self.describe(itself), 'threshold': limit,
                'probably_absent': None if limit is None or not found else found[0][1] <= limit,
                'results': [self.describe(*pair) for pair in found]}

    def find(self, words: str) -> dict:
        """Return images by the words in their paths and classes."""
        count, found = self.collection.find(words[:200], MOST_NAMED) if words.split() else (0, [])
        return {'count': count, 'results': [self.describe(number) for number in found]}

    def page(self) -> str:
        """Return the page."""
        from jinja2 import Environment, FileSystemLoader

        environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True)
        return environment.get_template(TEMPLATE.name).render(
            title=self.title, count=len(self.collection), note=ABSENT, can_embed=self.searcher.model is not None,
            most=MOST_BYTES)


def describe_interface(schema: dict) -> str:
    """Return the OpenAPI description as a page that fetches nothing."""
    rows = ''.join(f'<tr><td><code>{method.upper()} {html.escape(path)}</code><td>'
                   f'{html.escape(found.get("description", ""))}'
                   for path, methods in schema['paths'].items() for method, found in methods.items())
    title = html.escape(schema['info']['title'])
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark}body{font:1rem '
            'system-ui;line-height:1.5;margin:2rem;max-width:60rem}td{vertical-align:top;padding:.4rem;'
            'white-space:pre-line}</style>'
            f'<h1>{title}</h1><table>{rows}</table>'
            '<p>The same for programs: <a href="openapi.json">openapi.json</a></html>')


def add_guard(app, token: str | None) -> None:
    """Let an application ask for the token, where there is one, and say to browsers what its pages may do."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, RedirectResponse, Response

    @app.middleware('http')
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = (request.query_params.get('token') or request.cookies.get('token')
                 or request.headers.get('authorization', '').removeprefix('Bearer '))
        if token is not None and request.url.path != '/health' and not secrets.compare_digest(
                given.encode(), token.encode()):
            return JSONResponse({'error': 'this needs the token of the server: open /?token=WORD'}, 401)
        if token is not None and request.url.path == '/' and request.query_params.get('token', ''):
            response = RedirectResponse('/', 303)
            response.set_cookie('token', token, httponly=True, samesite='strict', max_age=10**7)
            return response
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response


def make_app(interface: Interface, hosts: list[str], token: str | None = None):
    """Build the FastAPI application.

    Args:
        hosts: names by which the server may be addressed, `*` for any; another site cannot pass itself off as this one.
        token: asked of every request, None: of none.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(title=f'Search in {interface.title}', docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(Refused)
    async def refuse(_request: Request, error: Refused) -> Response:
        return JSONResponse({'error': error.line}, error.status)

    @app.exception_handler(Unreachable)
    async def unreachable(_request: Request, error: Unreachable) -> Response:
        print(error, file=sys.stderr, flush=True)  # where it is asked is no client's business
        return JSONResponse({'error': 'the collection cannot be reached'}, 503)

    add_guard(app, token)

    @app.get('/', response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(interface.page(), headers={'Cache-Control': 'no-cache'})

    @app.post('/search')
    async def search(request: Request) -> dict:
        """Search with a picture: its bytes are the body, as in curl --data-binary @photo.jpg 'URL/search?k=5&binary=0'.

        Or with an image of the collection: a body of JSON, {"path": "birds/0.jpg", "k": 5} or {"image": "17"}.
        """
        return await interface.search(request)

    @app.get('/find')
    async def find(q: str = '') -> dict:
        """Find images by words in their path or class."""
        return await asyncio.get_running_loop().run_in_executor(interface.searcher.decoders, interface.find, q)

    @app.get('/any')
    async def any_image() -> dict:
        """Return an image at random."""
        return interface.describe(interface.collection.any())

    @app.get('/images/{number}')
    async def image(number: str, v: str = '') -> Response:
        """Return a thumbnail of an image, by its number."""
        found = await asyncio.get_running_loop().run_in_executor(
            interface.searcher.decoders, interface.thumbnail, interface.item_number(number))
        lasting = 'private, max-age=31536000, immutable' if v == interface.version_of(number) else 'no-cache'
        return Response(found, media_type='image/jpeg', headers={'Cache-Control': lasting})

    @app.get('/health')
    async def health() -> dict:
        """Say that the server is well."""
        return {'status': 'ok', 'images': len(interface.collection)}

    @app.get('/docs', response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return describe_interface(app.openapi())

    return app


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises UserError where the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)  # who asks before the data base is loaded waits
    except OSError as error:
        raise UserError(f'--host {host} --port {port} cannot be had ({error.strerror}); choose others') from None
    return found


def main(args) -> None:
    """Serve until a signal ends it."""
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError:
        raise UserError('serve.py needs fastapi and uvicorn; install them with: pip install -r requirements-serve.txt'
                        ) from None
    listening = listen(args.host, args.port)
    searcher = open_searcher(args)
    local = listening.getsockname()[0] in ('127.0.0.1', '::1')
    port = listening.getsockname()[1]
    name = f'[{args.host}]' if ':' in args.host else args.host
    hosts = ['127.0.0.1', 'localhost', '[::1]', name] if local else ['*']
    app = make_app(Interface(searcher, args.collection or Path(args.data_base).stem), hosts, args.token)
    print(f'{len(searcher.collection):,} images at http://{name}:{port}; Ctrl-C ends it', flush=True)
    if not local:
        print('Everybody who reaches this machine over the network ' + (
            'and knows the token can search and see the images.' if args.token else
            'can search and see the images; --token WORD asks for a word.'), flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning', timeout_keep_alive=5))
    try:
        server.run([listening])
    except KeyboardInterrupt:  # uvicorn has let the requests at hand end, and raises the signal again
        print('stopped')


if __name__ == '__main__':
    run_script(lambda: main(ARGS))
