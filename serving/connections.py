"""The connections of serve.py: uvicorn's, with limits of how long they wait for a request, and of their number."""
import asyncio

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # in which the first line and the headers of a request must arrive
KEEP_ALIVE_SECONDS = 5
SHUTDOWN_SECONDS = 15  # for the requests at hand after SIGTERM
MAX_CONNECTIONS = 500  # below the 1,024 files that systems let a process open


class Connection(H11Protocol):
    """A connection that is closed if a request does not arrive in time, or if others need its place."""

    deadline: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.start_deadline()
        are_open = [other for other in self.connections if not other.transport.is_closing()]
        if len(are_open) > MAX_CONNECTIONS:
            next((other for other in are_open if other.is_waiting and other is not self), self).transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.deadline.cancel()
        super().connection_lost(error)

    def on_response_complete(self) -> None:
        self.start_deadline()  # of the next request
        super().on_response_complete()

    def start_deadline(self) -> None:
        """Close the connection if no request's headers arrive in time; uvicorn limits only silence between two."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = self.loop.call_later(HEADER_SECONDS, self.close_if_waiting)

    def close_if_waiting(self) -> None:
        """Close the connection unless a request is being answered."""
        if self.is_waiting:
            self.transport.abort()


def make_server(app) -> uvicorn.Server:
    """Return a uvicorn server of an application, with limits."""
    return uvicorn.Server(uvicorn.Config(
        app, http=Connection, ws='none', log_level='warning', timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS))
