"""Who gets in: requests are written byte by byte, since libraries would not send what an attacker does."""
import socket

import pytest
import torch
from museum import Server, make_items

from retrieval.collection import FileCollection
from retrieval.searcher import Searcher

pytest.importorskip('fastapi')


@pytest.fixture(scope='module')
def searcher(tmp_path_factory):
    """Five images without files and without a model."""
    items, features = make_items(5)
    collection = FileCollection(tmp_path_factory.mktemp('access') / 'c.pth', {'args': {}}, 'f')
    collection.add(items, features)
    collection.finish()
    return Searcher(collection, None, None, torch.device('cpu'))


def send_raw(server, request: str) -> tuple[int, str]:
    """Send a request as it is; returns status and the whole response."""
    host, port = server.url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(request.replace('\n', '\r\n').encode('latin-1'))
        answer = b''.join(iter(lambda: connection.recv(2**16), b'')).decode()
    return int(answer.split()[1]), answer


@pytest.mark.parametrize('host', ['127.0.0.1:/health?', '127.0.0.1/health?', '127.0.0.1/health#', 'x@127.0.0.1/health?',
                                  '127.0.0.1:80:/health?', '', '[::1]/health?', '127.0.0.1\\health?'])
@pytest.mark.parametrize('hosts', [['127.0.0.1'], ['*']])
def test_no_host_header_passes_the_token(searcher, host, hosts):
    with Server(searcher, 'let-me-in', hosts) as server:
        status, answer = send_raw(server, f'GET /find?q=ara HTTP/1.1\nHost: {host}\nConnection: close\n\n')
    assert status == (401 if hosts == ['*'] else 400)
    assert 'results' not in answer
