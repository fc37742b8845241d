"""Uploads have limits of time and memory; searches of clients that left are not computed."""
import json
import socket
import threading
import time

import pytest
import torch
from museum import Server, make_items
from test_connections import connect

from retrieval import searcher as searcher_module
from retrieval.collection import FileCollection
from retrieval.searcher import Searcher
from serving import uploads

pytest.importorskip('fastapi')
SEARCH = b'{"image": "0", "k": 1}'


@pytest.fixture
def searcher(tmp_path) -> Searcher:
    """A collection of five images whose searches wait for `may_go_on`, and count their queries."""
    items, features = make_items(5)
    collection = FileCollection(tmp_path / 'c.pth', {'args': {}}, 'f')
    collection.add(items, features)
    collection.finish()
    searcher = Searcher(collection, None, None, torch.device('cpu'))
    search, searcher.may_go_on, searcher.computed = collection.search, threading.Event(), []

    def slow_search(queries, *words):
        searcher.computed.append(len(queries))
        searcher.may_go_on.wait(60)
        return search(queries, *words)

    collection.search = slow_search
    return searcher


def send(connection: socket.socket, body: bytes, length: int | None = None, kind: str = 'application/json') -> None:
    """Send a search whose body may be shorter than it claims."""
    connection.sendall(f'POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: {kind}\r\n'
                       f'Content-Length: {len(body) if length is None else length}\r\n\r\n'.encode() + body)


def receive(connection: socket.socket) -> tuple[int, str]:
    """Return status and text of a response."""
    answer = b''.join(iter(lambda: connection.recv(2**16), b'')).decode()
    return int(answer.split()[1]), answer


def wait_until(condition) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_body_that_does_not_arrive_is_not_waited_for(searcher, monkeypatch):
    monkeypatch.setattr(uploads, 'BODY_SECONDS', 0.2)
    with Server(searcher) as server, connect(server) as connection:
        send(connection, b'abc', 10**6, 'image/jpeg')
        status, answer = receive(connection)
    assert status == 408
    assert 'seconds to arrive' in answer


def test_uploads_share_a_memory_that_is_free_again_when_they_end(searcher):
    with Server(searcher) as server:
        server.api.uploads.capacity = 10**6
        stalled = [connect(server) for _ in range(3)]
        for connection in stalled:
            send(connection, bytes(300_000), 10**6, 'image/jpeg')
        wait_until(lambda: server.api.uploads.held == 900_000)
        with connect(server) as connection:
            send(connection, bytes(300_000), kind='image/jpeg')
            status, answer = receive(connection)
        assert status == 503
        assert 'retry-after: 2' in answer.lower()
        for connection in stalled:
            connection.close()
        wait_until(lambda: server.api.uploads.held == 0)
        with connect(server) as connection:
            send(connection, bytes(300_000), kind='image/jpeg')
            assert receive(connection)[0] == 409  # there is no model


def test_searches_of_clients_that_left_are_not_computed(searcher):
    with Server(searcher) as server, connect(server) as first, connect(server) as last:
        send(first, SEARCH)
        wait_until(lambda: searcher.computed)
        gone = [connect(server) for _ in range(30)]
        for connection in gone:
            send(connection, SEARCH)
        wait_until(lambda: searcher.waiting == 31)
        for connection in gone:
            connection.close()
        wait_until(lambda: searcher.waiting == 1)
        send(last, SEARCH)
        wait_until(lambda: searcher.waiting == 2)
        searcher.may_go_on.set()
        assert [receive(first)[0], receive(last)[0]] == [200, 200]
    assert sum(searcher.computed) == 2


def test_a_full_queue_refuses_with_503(searcher, monkeypatch):
    monkeypatch.setattr(searcher_module, 'MAX_WAITING', 3)
    with Server(searcher) as server:
        waiting = [connect(server) for _ in range(3)]
        for connection in waiting:
            send(connection, SEARCH)
        wait_until(lambda: searcher.waiting == 3)
        status, headers, body = server.request('/search', json.loads(SEARCH))
        assert (status, headers['retry-after']) == (503, '2')
        assert b'busy' in body
        searcher.may_go_on.set()
        assert [receive(connection)[0] for connection in waiting] == [200] * 3


def test_a_form_holds_the_picture():
    form = (b'--x\r\nContent-Disposition: form-data; name="k"\r\n\r\n5\r\n--x\r\nContent-Disposition: form-data; '
            b'name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n%b\r\n--x--\r\n')
    for picture in (b'a picture', b'\r\n--y\r\n\r\n', b''):
        assert uploads.picture_of(bytearray(form % picture), 'multipart/form-data; boundary=x') == picture
    assert uploads.picture_of(bytearray(b'raw'), 'image/jpeg') == b'raw'
    for body, content_type in ((form, 'multipart/form-data'), (form, 'multipart/form-data; boundary=other'),
                               (b'', 'multipart/form-data; boundary=x')):
        with pytest.raises(searcher_module.RequestError, match='the form holds no file'):
            uploads.picture_of(bytearray(body), content_type)
