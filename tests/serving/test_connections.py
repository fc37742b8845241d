"""Connections that send nothing, or little, end by themselves and do not keep others out."""
import contextlib
import socket
import time

import pytest
from museum import Server
from test_access import searcher  # noqa: F401

connections = pytest.importorskip('serving.connections')


def connect(server) -> socket.socket:
    host, port = server.url.removeprefix('http://').split(':')
    return socket.create_connection((host, int(port)), timeout=60)


def is_closed(connection: socket.socket) -> bool:
    """Wait until the server closes a connection."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(2**16):
            pass
    return True


@pytest.mark.parametrize('sent', [b'', b'GET / HT', b'GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: y',
                                  b'GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HT',
                                  b'GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\nx'])
def test_a_request_that_does_not_arrive_is_not_waited_for(searcher, monkeypatch, sent):  # noqa: F811
    monkeypatch.setattr(connections, 'HEADER_SECONDS', 0.3)
    with Server(searcher) as server, connect(server) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


def test_drops_of_a_request_do_not_lengthen_its_time(searcher, monkeypatch):  # noqa: F811
    monkeypatch.setattr(connections, 'HEADER_SECONDS', 0.3)

    def send_drops(connection) -> None:
        for _ in range(1000):  # far longer than the time that a request has
            connection.sendall(b'G')
            time.sleep(0.01)

    with Server(searcher) as server, connect(server) as connection, \
            pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_drops(connection)


def test_idle_connections_make_room_for_others(searcher, monkeypatch):  # noqa: F811
    monkeypatch.setattr(connections, 'MAX_CONNECTIONS', 4)
    with Server(searcher) as server:
        idle = [connect(server) for _ in range(9)]
        assert server.request('/health')[0] == 200
        are_open = [connection for connection in server.server.server_state.connections
                    if not connection.transport.is_closing()]
        assert len(are_open) <= 4
        for connection in idle:
            connection.close()
