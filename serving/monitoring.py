"""What an operator sees of serve.py: a line for each request, and counts and times for Prometheus."""
import sys
import time
from collections import Counter

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, float('inf'))  # seconds of a request


class Monitor:
    """ASGI middleware that times requests.

    Args:
        access_log: print a line for each request.
    """

    def __init__(self, app, metrics: 'Metrics', access_log: bool = False):
        self.app, self.metrics, self.access_log = app, metrics, access_log

    async def __call__(self, scope, receive, send) -> None:
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        status, start = 0, time.perf_counter()  # no status: the client has left

        async def send_watched(message) -> None:
            nonlocal status
            status = message.get('status', status)
            await send(message)

        try:
            # uvicorn, which keeps the scope that it has made, sends no body in answer to HEAD.
            method = 'GET' if scope['method'] == 'HEAD' else scope['method']
            await self.app({**scope, 'method': method}, receive, send_watched)
        except Exception:
            status = status or 500
            raise
        finally:
            seconds = time.perf_counter() - start
            self.metrics.add(status, seconds)
            if self.access_log:
                client = scope['client'][0] if scope['client'] else '-'
                path = scope['path'].encode('ascii', 'backslashreplace').decode()  # without the token of its query
                print(f'{time.strftime("%Y-%m-%dT%H:%M:%S%z")} {client} {scope["method"]} {path!r} {status} '
                      f'{1000 * seconds:.1f} ms', file=sys.stderr, flush=True)


class Metrics:
    """Requests by status, and their seconds as a histogram."""

    def __init__(self):
        self.requests, self.buckets, self.seconds = Counter(), Counter(), 0.0

    def add(self, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests[status] += 1
        self.seconds += seconds
        self.buckets.update(limit for limit in BUCKETS if seconds <= limit)

    def text(self, waiting: int) -> str:
        """Return all in Prometheus' text format.

        Args:
            waiting: searches that are answered or wait.
        """
        lines = ['# TYPE serve_waiting_searches gauge', f'serve_waiting_searches {waiting}',
                 '# TYPE serve_requests_total counter',
                 *(f'serve_requests_total{{status="{status}"}} {count}' for status, count in self.requests.items()),
                 '# TYPE serve_request_seconds histogram',
                 *(f'serve_request_seconds_bucket{{le="{str(limit).replace("inf", "+Inf")}"}} {self.buckets[limit]}'
                   for limit in BUCKETS),
                 f'serve_request_seconds_sum {self.seconds:.6f}',
                 f'serve_request_seconds_count {sum(self.requests.values())}']
        return '\n'.join(lines) + '\n'
