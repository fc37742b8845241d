"""Read what a request to /search asks for, within limits of time and memory: a picture, or JSON."""
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from email.message import Message
from typing import NamedTuple

from retrieval.searcher import RequestError

MAX_UPLOAD = 20 * 10**6  # bytes
MAX_JSON = 10**4  # bytes
MAX_FIELDS = 16  # of a form
BODY_SECONDS = 120  # in which the body of a request must arrive
DEFAULT_K, MAX_K = 24, 200  # images in an answer


class SearchRequest(NamedTuple):
    """What a request to /search asks for: one of picture, image and path."""

    picture: bytearray | None  # an image file
    image: str | None  # index of an image of the collection
    path: str | None  # relative or absolute path of one
    k: int  # number of neighbours
    binary: bool  # by Hamming distance


class Uploads:
    """Reads searches; the bodies of all requests together may take so many bytes.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int = 15 * MAX_UPLOAD):
        self.capacity, self.held = capacity, 0

    @contextlib.asynccontextmanager
    async def read_body(self, request, limit: int) -> AsyncIterator[bytearray]:
        """Read the body of a request, and count its bytes until the context ends.

        Raises:
            RequestError: if it is larger than `limit`, takes too long, or finds the memory full.
        """
        body = bytearray()

        async def read() -> None:
            refusal = None
            async for chunk in request.stream():
                if refusal is not None:  # a client that is still sending would not receive the answer
                    continue
                body.extend(chunk)
                self.held += len(chunk)
                if len(body) > limit:
                    refusal = RequestError(413, f'more than {limit:,} bytes; send a smaller picture')
                elif self.held > self.capacity:
                    refusal = RequestError(503, 'too many uploads at once; try again in some seconds')
                if refusal is not None:
                    self.held -= len(body)
                    body.clear()
            if refusal is not None:
                raise refusal

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
            yield body
        except asyncio.TimeoutError:
            raise RequestError(408, f'the body took more than {BODY_SECONDS} seconds to arrive') from None
        finally:
            self.held -= len(body)

    @contextlib.asynccontextmanager
    async def read_search(self, request) -> AsyncIterator[SearchRequest]:
        """Read a request to /search: a picture, as the body or in a form, or JSON; raises RequestError."""
        content_type = request.headers.get('content-type', '')
        is_json = content_type.split(';')[0].strip().lower() == 'application/json'
        async with self.read_body(request, MAX_JSON if is_json else MAX_UPLOAD) as body:
            if is_json:
                yield parse_json(body)
            else:
                fields = request.query_params
                if 'path' in fields or 'image' in fields:
                    raise RequestError(422, 'send path or image as JSON')
                k, binary = parse_k(fields.get('k')), parse_binary(fields.get('binary'))
                yield SearchRequest(picture_of(body, content_type), None, None, k, binary)


async def while_connected(request, work: Coroutine):
    """Await the answer to a request that was read; cancel it, and raise ClientDisconnect, if the client leaves."""
    from starlette.requests import ClientDisconnect

    async def wait_until_gone() -> None:
        while (await request.receive())['type'] != 'http.disconnect':
            pass

    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_until_gone())
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


def parse_json(body: bytearray) -> SearchRequest:
    """Parse JSON that asks for an image of the collection; raises RequestError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or ('path' in fields) == ('image' in fields):
        raise RequestError(422, 'the JSON must be {"path": ...} or {"image": ...}, with k and binary as options')
    image, path = (str(fields[name]) if name in fields else None for name in ('image', 'path'))
    return SearchRequest(None, image, path, parse_k(fields.get('k')), parse_binary(fields.get('binary')))


def picture_of(body: bytearray, content_type: str) -> bytearray:
    """Return the picture of a body: the body itself, or the first file of a form, as of `curl -F image=@photo.jpg`."""
    header = Message()
    header['Content-Type'] = content_type
    if header.get_content_type() != 'multipart/form-data':
        return body
    delimiter = f'\r\n--{header.get_boundary("no boundary")}'.encode()
    for part in (b'\r\n' + body).split(delimiter, MAX_FIELDS)[1:]:
        head, _, content = part.partition(b'\r\n\r\n')
        if b'filename' in head.lower():
            return content
    raise RequestError(422, 'the form holds no file: curl -F image=@photo.jpg')


def parse_k(value) -> int:
    """Return the number of neighbours that a request asks for; raises RequestError if it is not valid."""
    try:
        k = DEFAULT_K if value is None else int(value)
    except (ValueError, TypeError, OverflowError):
        k = 0
    if isinstance(value, (bool, float)) or not 1 <= k <= MAX_K:
        raise RequestError(422, f'k must be a whole number from 1 to {MAX_K}')
    return k


def parse_binary(value) -> bool:
    """Return whether a request asks for binary codes; raises RequestError if it is not valid."""
    if value not in (None, False, True, '0', '1', 'true', 'false'):
        raise RequestError(422, 'binary must be true or false')
    return value in (True, '1', 'true')
