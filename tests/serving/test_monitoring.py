"""What an operator sees: the access log, /metrics, /health, /ready."""
import json
import re

import pytest
from museum import Server
from test_access import searcher  # noqa: F401
from test_connections import connect

pytest.importorskip('fastapi')


def test_a_request_is_a_line_of_the_log_without_its_token(searcher, capsys):  # noqa: F811
    with Server(searcher, 'let-me-in', access_log=True) as server:
        server.request('/find?q=ara&token=let-me-in')
        server.request('/images/99%0a%1b%c3%a9?token=let-me-in')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} 127\.0\.0\.1 GET '/find' 200 \d+\.\d ms\n"
                        r"\S+ 127\.0\.0\.1 GET '/images/99\\n\\x1b\\\\xe9' 404 \d+\.\d ms\n", capsys.readouterr().err)


def test_metrics_count_requests_by_status_and_time(searcher):  # noqa: F811
    with Server(searcher) as server:
        for address in ('/random', '/random', '/images/99'):
            server.request(address)
        status, headers, body = server.request('/metrics')
        lines = body.decode().splitlines()
        assert (status, headers['content-type']) == (200, 'text/plain; version=0.0.4; charset=utf-8')
        assert {'serve_requests_total{status="200"} 2', 'serve_requests_total{status="404"} 1',
                'serve_waiting_searches 0', 'serve_request_seconds_bucket{le="+Inf"} 3',
                'serve_request_seconds_count 3'} <= set(lines)


def test_head_is_answered_without_a_body(searcher):  # noqa: F811
    with Server(searcher) as server:
        for path in ('/', '/health', '/images/99'):
            with connect(server) as connection:
                connection.sendall(f'HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n'.encode())
                answer = b''.join(iter(lambda connection=connection: connection.recv(2**16), b''))
            assert answer.startswith(b'HTTP/1.1 404' if '99' in path else b'HTTP/1.1 200'), answer
            assert answer.endswith(b'\r\n\r\n')
            assert b'content-length: ' in answer


def test_ready_tells_how_many_images_are_searched(searcher):  # noqa: F811
    with Server(searcher) as server:
        assert json.loads(server.request('/ready')[2]) == {'status': 'ready', 'images': 5}
