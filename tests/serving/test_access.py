"""Who gets in: requests are written byte by byte, since libraries would not send what an attacker does."""
import json
import socket

import urllib.error
import urllib.request

import pytest
import torch
from museum import Server, make_items

import serve
from common.errors import UserError
from retrieval.collection import FileCollection
from retrieval.searcher import Searcher
from serving import access

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


def test_a_public_server_answers_to_addresses_and_its_names_alone(searcher):
    with Server(searcher, hosts=['museum.example']) as server:
        for host in ('127.0.0.1', '192.168.1.7:8000', '[fe80::1]:80', 'museum.example', 'MUSEUM.example:8000'):
            assert server.request('/random', Host=host)[0] == 200, host
        for host in ('evil.example', 'museum.example.evil', '1.evil', 'museum.example/'):
            status, _, answer = server.request('/random', Host=host)
            assert (status, b'--allowed_host' in answer) == (400, True), host


def test_another_site_can_neither_show_images_nor_send_uploads(searcher):
    with Server(searcher) as server:
        own = server.url.removeprefix('http://')
        for headers in ({'Sec-Fetch-Site': 'cross-site', 'Sec-Fetch-Mode': 'no-cors'}, {'Sec-Fetch-Site': 'same-site'},
                        {'Origin': 'http://evil.example'}, {'Origin': 'null'}, {'Origin': 'http://127.0.0.1:1'},
                        {'Origin': 'http://[:'}):
            assert server.request('/images/0', **headers)[0] == 403, headers
            assert server.request('/search', b'x', **headers)[0] == 403, headers
        for headers in ({'Sec-Fetch-Site': 'same-origin'}, {'Sec-Fetch-Site': 'none'}, {'Origin': f'http://{own}'},
                        {'Sec-Fetch-Site': 'cross-site', 'Sec-Fetch-Mode': 'navigate'}):
            assert server.request('/random', **headers)[0] == 200, headers
        assert server.request('/random')[1]['cross-origin-resource-policy'] == 'same-origin'


def cookie_of(url: str, **headers) -> tuple[str, str]:
    """Return Location and Set-Cookie of a response that redirects."""
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.build_opener(Stay).open(urllib.request.Request(url, None, headers))
    return error.value.headers['Location'], error.value.headers['Set-Cookie']


def test_wrong_tokens_are_reported_and_limited(searcher, monkeypatch, capsys):
    right, wrong = {'Authorization': 'Bearer let-me-in'}, {'Authorization': 'Bearer let-me-out'}
    with Server(searcher, 'let-me-in') as server:
        assert [server.request('/random', **wrong)[0] for _ in range(12)] == [401] * access.MAX_TRIES + [429] * 2
        assert capsys.readouterr().err == access.MAX_TRIES * '127.0.0.1 sent a wrong token\n'
        status, headers, _ = server.request('/random', **right)  # else the answer would tell that it is the right one
        assert (status, headers['retry-after']) == (429, '60')
        assert server.request('/random')[0] == 401
        assert server.request('/health')[0] == 200
        monkeypatch.setattr(access, 'TRY_SECONDS', 0)
        assert server.request('/random', **right)[0] == 200


def test_the_clients_that_are_remembered_are_limited(monkeypatch):
    monkeypatch.setattr(access, 'MAX_CLIENTS', 3)
    tries = access.FailedTries()
    for client in 'abcde':
        tries.add(client)
    assert list(tries.times) == ['c', 'd', 'e']


def test_the_cookie_is_secure_behind_https_and_stays_below_the_root_path(searcher):
    with Server(searcher, 'let-me-in') as server:
        location, cookie = cookie_of(f'{server.url}/?token=let-me-in')
        assert (location, 'Secure' in cookie) == ('/', False)
        assert 'HttpOnly' in cookie
        assert 'Secure' in cookie_of(f'{server.url}/?token=let-me-in', **{'X-Forwarded-Proto': 'https'})[1]
    with Server(searcher, 'let-me-in', root_path='/museum') as server:
        for prefix in ('', '/museum'):  # a proxy may strip the path, or not
            location, cookie = cookie_of(f'{server.url}{prefix}/?token=let-me-in')
            assert (location, 'Path=/museum/;' in cookie) == ('/museum/', True)
            assert server.request(f'{prefix}/health')[0] == 200
            assert server.request(f'{prefix}/random')[0] == 401
            assert server.request(f'{prefix}/random', Cookie='token=let-me-in')[0] == 200
            schema = server.request(f'{prefix}/openapi.json', Cookie='token=let-me-in')[2]
            assert json.loads(schema)['servers'] == [{'url': '/museum'}]


@pytest.mark.parametrize('root_path', ['/search', '/images/museum', '/metrics'])
def test_a_root_path_that_is_an_address_of_the_server_is_refused(searcher, root_path):
    with pytest.raises(UserError, match=f'--root_path {root_path}: the server has an address of that name'):
        serve.make_app(serve.Api(searcher, 'museum'), ['*'], root_path=root_path)
    serve.make_app(serve.Api(searcher, 'museum'), ['*'], root_path=f'/museum{root_path}')
