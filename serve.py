"""Serve a web page and an HTTP API that search in a data base of embed.py or of a run.

    python serve.py --data_base museum.pth                        # http://127.0.0.1:8000
    python serve.py --data_base RUN_data_base.pth --data_path /home/data --port 8080
    python serve.py --data_base museum.pth --host 0.0.0.0 --token WORD    # visible to other machines
    python serve.py --qdrant http://localhost:6333 --collection museum --model results/RUN_model.pth

    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/search?k=5'
    curl --json '{"path": "birds/0.jpg", "k": 5}' http://127.0.0.1:8000/search

On the page, drop, paste, choose or take a picture, and click a result to search with it. Only this machine can open the
page unless --host says otherwise. Uploads stay in memory. Images are served by their index in the data base, never by
path. Requests that arrive together are embedded and searched as one batch. SIGTERM ends the server after it has
answered the requests at hand; SIGHUP reads the collection again.
"""
import asyncio
import hashlib
import html
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
from functools import lru_cache
from pathlib import Path

from common.errors import Unreachable, UserError
from utils import (Parser, add_collection_flags, check_between, check_collection_flags, refuse_without_effect,
                   run_script, user_path)

MAX_FOUND = 60  # images that /find returns
MIN_TOKEN = 8  # characters
CACHED_THUMBNAILS = 4096
TEMPLATE = Path(__file__).parent / 'templates' / 'serve.html'


# ---------------------------------------------------- command line --------------------------------------------------
def get_args(argv: list[str] | None = None):
    """Parse and check the command line."""
    parser = Parser(description=__doc__)
    add_collection_flags(parser, data_base='file, or its name in --results_dir', model='with --qdrant: the model that '
                         'embedded the collection, or its ONNX file; without it, only images of the collection can be '
                         'searched for')
    parser.add_argument('--data_path', type=user_path, help='folder that holds the data set of a run; a '
                        'collection of embed.py knows its own folders [/home/data]')
    parser.add_argument('--results_dir', type=user_path, help='where data bases that are named without a '
                        'folder are read [results]')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on; with 0.0.0.0, other machines can '
                        'open the page [%(default)s]')
    parser.add_argument('--port', type=int, default=8000, help='0: any free port [%(default)s]')
    parser.add_argument('--allowed_host', nargs='+', default=[], metavar='NAME', help='names by which clients may '
                        'address the server, beside its addresses, localhost and the name of this machine; with a '
                        'proxy in front, the name of the site; *: any')
    parser.add_argument('--token', metavar='WORD', help='required of every client: open /?token=WORD once in a '
                        'browser, or send the header Authorization: Bearer WORD. The list of processes shows it to '
                        'other users of this machine, unlike --token_file and the environment variable SERVE_TOKEN')
    parser.add_argument('--token_file', type=user_path, metavar='FILE', help='file that holds the token')
    parser.add_argument('--root_path', default='', metavar='/PATH', help='where a proxy in front shows the page, if '
                        'not at /')
    parser.add_argument('--access_log', action='store_true', help='print a line for each request: time, client, '
                        'method, path, status, duration')
    parser.add_argument('--device', default='auto', help='where uploads are embedded: auto, cpu, mps, cuda, cuda:N '
                        '[%(default)s]')
    args = parser.parse_args(argv)
    check_between(args, {'port': (0, 65535)})
    check_collection_flags(args)
    if args.qdrant is None:
        refuse_without_effect(args, {'model': ' with --data_base: the model beside the data base is used'})
    else:
        refuse_without_effect(args, dict.fromkeys(('data_path', 'results_dir'), ' with --qdrant'))
    args.token = read_token(args)
    if args.root_path and not re.fullmatch(r'(/[\w.-]+)+', args.root_path):
        raise UserError(f'--root_path {args.root_path} must be like /museum: a slash before each part, none at the end')
    return args


def read_token(args) -> str | None:
    """Return the token of --token, --token_file or SERVE_TOKEN; None if none is set."""
    if args.token is not None and args.token_file is not None:
        raise UserError('name one of --token WORD and --token_file FILE')
    source, token = '--token', args.token
    if args.token_file is not None:
        source, token = f'--token_file {args.token_file}', Path(args.token_file).read_text(errors='replace').strip()
    elif token is None and 'SERVE_TOKEN' in os.environ:
        source, token = 'SERVE_TOKEN', os.environ['SERVE_TOKEN']
    if token is not None and not (len(token) >= MIN_TOKEN and token.isascii() and token.isprintable()):
        raise UserError(f'{source}: a token must be {MIN_TOKEN} or more printable ASCII characters')
    return token


if __name__ == '__main__':  # --help and mistakes need not wait for the imports below
    ARGS = run_script(get_args)

from common.distributed import select_device
from common.images import BrokenImage
from common.limited import LimitExceeded
from retrieval.search import NO_MATCH
from retrieval.searcher import Query, RequestError, Searcher, open_qdrant_searcher, open_searcher
from serving.monitoring import Metrics, Monitor
from serving.thumbnails import make_thumbnail
from serving.uploads import MAX_UPLOAD, SearchRequest, Uploads, while_connected


# ---------------------------------------------------- answers -----------------------------------------------------
def version_of(item) -> str:
    """Return a hash of an image's item: in its URL, it lets browsers cache the image for good."""
    return hashlib.sha256(repr(item).encode()).hexdigest()[:12]


def summary_of(collection, index: int) -> dict:
    """Return what answers say about an image."""
    item = collection.item(index)
    return {'image': str(index), 'url': f'images/{index}?v={version_of(item)}', 'path': item.path,
            'class': item.label or None}


def parse_index(collection, text: str) -> int:
    """Return the index of an image of the collection; raises RequestError if there is none."""
    try:
        index = int(text)
        collection.item(index)
    except Unreachable:
        raise
    except (ValueError, IndexError):
        raise RequestError(404, f'there is no image {text[:40]!r}') from None
    return index


async def answer_search(searcher: Searcher, asked: SearchRequest) -> dict:
    """Search for a picture or an image of the collection."""
    if asked.binary and not searcher.collection.supports_binary:
        raise RequestError(422, 'this collection ranks by cosine only; leave binary out')
    if asked.picture is None:
        index, query = await asyncio.to_thread(query_of_image, searcher.collection, asked)
    else:
        index, query = None, await query_of_picture(searcher, asked)
    neighbours = [pair for pair in await searcher.search(query) if pair[0] != index][:asked.k]
    # An image of the collection is there, so only uploads are judged.
    threshold = searcher.threshold if index is None and not asked.binary else None
    no_close_match = None
    if threshold is not None and neighbours:
        no_close_match = neighbours[0][1] < threshold

    def describe() -> dict:
        return {'query': None if index is None else summary_of(searcher.collection, index), 'threshold': threshold,
                'no_close_match': no_close_match,
                'results': [{**summary_of(searcher.collection, other), 'similarity': similarity}
                            for other, similarity in neighbours]}

    return await asyncio.to_thread(describe)


def query_of_image(collection, asked: SearchRequest) -> tuple[int, Query]:
    """Return the index and the query of an image of the collection; raises RequestError if there is none."""
    index = collection.index_of(asked.path) if asked.image is None else parse_index(collection, asked.image)
    if index is None:
        raise RequestError(404, f'no image, or more than one, has the path {asked.path[:200]!r}')
    return index, Query(None, collection.feature(index), asked.k + 1, asked.binary)  # it finds itself, too


async def query_of_picture(searcher: Searcher, asked: SearchRequest) -> Query:
    """Return the query of an uploaded picture; raises RequestError if it cannot be searched for."""
    if searcher.model is None:
        raise RequestError(409, 'the model is missing: only images of the collection can be searched for')
    try:
        return Query(await searcher.decode(asked.picture), None, asked.k, asked.binary)
    except (BrokenImage, LimitExceeded) as error:
        reason = 'unknown format' if 'cannot identify' in str(error) else str(error)
        raise RequestError(415, f'the picture cannot be read ({reason})') from None


class Api:
    """What the server answers, independent of HTTP."""

    def __init__(self, searcher: Searcher, title: str):
        self.searcher, self.title = searcher, title
        self.uploads, self.metrics = Uploads(), Metrics()
        self.thumbnail = lru_cache(CACHED_THUMBNAILS)(self.make_thumbnail)

    async def search(self, request) -> dict:
        """Answer a request to /search."""
        async with self.uploads.read_search(request) as asked:
            with self.searcher.admit():
                return await while_connected(request, answer_search(self.searcher, asked))

    def make_thumbnail(self, item) -> bytes:
        """Return an image as a small JPEG; raises RequestError if it is missing, broken, or a link elsewhere."""
        try:
            return self.searcher.decoders.call(make_thumbnail, item.folder, item.path)
        except (BrokenImage, LimitExceeded, UserError):
            raise RequestError(404, 'the image is missing or broken') from None

    async def image(self, text: str) -> tuple[bytes, str]:
        """Return the thumbnail of an image, and its version; raises RequestError if there is none."""
        collection = self.searcher.collection

        def find_item():
            return collection.item(parse_index(collection, text))

        item = await asyncio.to_thread(find_item)
        return await self.searcher.in_decoder_thread(self.thumbnail, item), version_of(item)

    def random_image(self) -> dict:
        """Return a random image."""
        collection = self.searcher.collection
        return summary_of(collection, collection.random_index())

    def find(self, words: str) -> dict:
        """Find images by words in their path and class."""
        collection, count, indices = self.searcher.collection, 0, []
        if words.split():
            count, indices = collection.find(words[:200], MAX_FOUND)
        return {'count': count, 'results': [summary_of(collection, index) for index in indices]}

    def page(self) -> str:
        """Return the web page."""
        from jinja2 import Environment, FileSystemLoader

        environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True)
        return environment.get_template(TEMPLATE.name).render(
            title=self.title, count=len(self.searcher.collection), note=NO_MATCH,
            can_embed=self.searcher.model is not None, max_upload=MAX_UPLOAD)


def render_docs(schema: dict) -> str:
    """Return an OpenAPI schema as a page that loads nothing from elsewhere."""
    rows = ''.join(f'<tr><td><code>{method.upper()} {html.escape(path)}</code><td>'
                   f'{html.escape(operation.get("description", ""))}'
                   for path, operations in schema['paths'].items() for method, operation in operations.items())
    title = html.escape(schema['info']['title'])
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark}body{font:1rem '
            'system-ui;line-height:1.5;margin:2rem;max-width:60rem}td{vertical-align:top;padding:.4rem;'
            'white-space:pre-line}</style>'
            f'<h1>{title}</h1><table>{rows}</table>'
            '<p>Machine-readable: <a href="openapi.json">openapi.json</a></html>')


# ---------------------------------------------------- HTTP --------------------------------------------------------
def make_app(api: Api, hosts: list[str], token: str | None = None, root_path: str = '',
             access_log: bool = False):
    """Build the FastAPI application.

    Args:
        hosts: names by which clients may address the server, beside IP addresses; `*`: any.
        token: required of every request; None: of none.
        root_path: below which a proxy shows the page.
        access_log: print a line for each request.

    Raises:
        UserError: if `root_path` begins with an address of the server. Where the proxy takes it away, /search would
            then be taken for the page.
    """
    from fastapi import FastAPI

    from serving.access import Guard

    app = FastAPI(title=f'Search in {api.title}', docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts, token=token, root_path=root_path)
    app.add_middleware(Monitor, metrics=api.metrics, access_log=access_log)  # around the guard
    add_error_handlers(app)
    add_routes(app, api)
    first_part = root_path.split('/', 2)[1] if root_path else ''
    if first_part and first_part in {route.path.split('/')[1] for route in app.routes}:
        raise UserError(f'--root_path {root_path}: the server has an address of that name; choose another path')
    return app


def add_error_handlers(app) -> None:
    """Answer mistakes of the client by 4xx, and an unreachable collection by 503, each with a line of JSON."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response
    from starlette.requests import ClientDisconnect

    @app.exception_handler(RequestError)
    async def request_error(_request: Request, error: RequestError) -> Response:
        headers = {'Retry-After': '2'} if error.status == 503 else None
        return JSONResponse({'error': error.message}, error.status, headers)

    @app.exception_handler(Unreachable)
    async def unreachable(_request: Request, error: Unreachable) -> Response:
        print(error, file=sys.stderr, flush=True)  # clients are not told the address of the Qdrant server
        return JSONResponse({'error': 'the collection cannot be reached'}, 503, {'Retry-After': '10'})

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody receives it


def add_routes(app, api: Api) -> None:
    """Add the addresses of the server; their docstrings are its documentation at /docs."""
    from fastapi import Request
    from fastapi.responses import HTMLResponse, Response

    @app.get('/', include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(await asyncio.to_thread(api.page), headers={'Cache-Control': 'no-cache'})

    @app.post('/search')
    async def search(request: Request) -> dict:
        """Search with a picture, whose bytes are the body: curl --data-binary @photo.jpg 'URL/search?k=5&binary=0'.

        Or with an image of the collection; the body is JSON: {"path": "birds/0.jpg", "k": 5} or {"image": "17"}.
        """
        return await api.search(request)

    @app.get('/find')
    async def find(q: str = '') -> dict:
        """Find images by words in their path or class."""
        return await asyncio.to_thread(api.find, q)

    @app.get('/random')
    async def random_image() -> dict:
        """Return a random image."""
        return await asyncio.to_thread(api.random_image)

    @app.get('/images/{index}')
    async def image(index: str, v: str = '') -> Response:
        """Return the thumbnail of an image."""
        jpeg, version = await api.image(index)
        cache_control = 'private, max-age=31536000, immutable' if v == version else 'no-cache'
        return Response(jpeg, media_type='image/jpeg', headers={'Cache-Control': cache_control})

    @app.get('/health')
    async def health() -> dict:
        """Report that the process answers; needs no token."""
        return {'status': 'ok'}

    @app.get('/ready')
    async def ready() -> dict:
        """Embed a picture and search for it: the server works."""
        with api.searcher.admit():
            return {'status': 'ready', 'images': await api.searcher.check()}

    @app.get('/metrics')
    async def metrics() -> Response:
        """Return counts and times for Prometheus."""
        return Response(api.metrics.text(api.searcher.waiting), media_type='text/plain; version=0.0.4')

    @app.get('/docs', include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()))


# ---------------------------------------------------- main --------------------------------------------------------
def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises UserError if the address is not available."""
    try:
        *kind, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(*kind)  # family, type and TCP by name: else asyncio does not set TCP_NODELAY
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)  # clients that connect before the data base is loaded wait
    except OSError as error:
        raise UserError(f'--host {host} --port {port} is not available ({error.strerror}); choose others') from None
    return listening


def open_collection(args) -> Searcher:
    """Open the collection that the command line names."""
    device = select_device(args.device)
    if args.qdrant is not None:
        return open_qdrant_searcher(args.qdrant, args.collection, args.model, device)
    return open_searcher(args.data_base, args.results_dir or 'results', args.data_path or '/home/data', device)


def reload(api: Api, args) -> None:
    """Open the collection again; if that fails, the one that is open stays."""
    try:
        api.searcher = open_collection(args)
        api.thumbnail.cache_clear()
        print(f'reloaded: {len(api.searcher.collection):,} images', flush=True)
    except (UserError, OSError) as error:
        print(f'not reloaded: {error}', file=sys.stderr, flush=True)


def main(args) -> None:
    """Serve until a signal ends it."""
    try:
        import fastapi  # noqa: F401

        from serving.connections import make_server
    except ImportError:
        raise UserError('serve.py needs fastapi and uvicorn; install them with: pip install -r requirements-serve.txt'
                        ) from None
    listening = listen(args.host, args.port)  # a taken port is reported before the data base is loaded
    multiprocessing.set_forkserver_preload(['retrieval.searcher'])  # imported once for all processes that decode
    searcher = open_collection(args)
    address, port = listening.getsockname()[:2]
    name = f'[{args.host}]' if ':' in args.host else args.host
    is_local = address in ('127.0.0.1', '::1')
    hosts = ['localhost', args.host, *([] if is_local else [socket.gethostname()]), *args.allowed_host]
    api = Api(searcher, args.collection or Path(args.data_base).stem)
    app = make_app(api, hosts, args.token, args.root_path, args.access_log)
    if hasattr(signal, 'SIGHUP'):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=reload, args=(api, args)).start())
    print(f'{len(searcher.collection):,} images at http://{name}:{port}; press Ctrl-C to stop', flush=True)
    if not is_local and args.token is None:
        print('Anyone who can reach this machine over the network can search and see the images; --token WORD '
              'restricts it.', flush=True)
    elif not is_local:
        print('Anyone who can reach this machine over the network and knows the token can search and see the images.',
              flush=True)
    threading.Thread(target=searcher.decoders.call, args=(abs, 1), daemon=True).start()  # starts them, some seconds
    try:
        make_server(app).run([listening])
    except KeyboardInterrupt:  # uvicorn has answered the requests at hand, and raises the signal again
        print('stopped')


if __name__ == '__main__':
    run_script(lambda: main(ARGS))
