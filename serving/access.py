"""Who may use serve.py: the server's own name as Host, no request that another site sends, and the token."""
import ipaddress
import re
import secrets
import sys
import time

from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import Request

OPEN_PATHS = {'/health'}  # need no token
HOST = re.compile(r'(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[\w.-]+))(?::\d+)?', re.IGNORECASE)  # with a port
MAX_TRIES, TRY_SECONDS = 10, 60  # wrong tokens of a client in so many seconds; then it has to wait
MAX_CLIENTS = 10_000  # whose wrong tokens are remembered
SECURITY_HEADERS = {
    'Content-Security-Policy': "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src "
    "'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'Cross-Origin-Resource-Policy': 'same-origin',  # no other site shows the images
    'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer'}


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


class FailedTries:
    """The wrong tokens that each client has sent lately."""

    def __init__(self):
        self.times = {}  # {client: seconds of time.monotonic}

    def is_blocked(self, client: str) -> bool:
        """Return whether a client has to wait before its next try."""
        recent = [moment for moment in self.times.pop(client, ()) if moment > time.monotonic() - TRY_SECONDS]
        if recent:
            self.times[client] = recent
        return len(recent) >= MAX_TRIES

    def add(self, client: str) -> None:
        """Note a wrong token, and tell the operator."""
        print(f'{client} sent a wrong token', file=sys.stderr, flush=True)
        self.times.setdefault(client, []).append(time.monotonic())
        if len(self.times) > MAX_CLIENTS:
            del self.times[next(iter(self.times))]  # the one that has not tried for longest


class Guard:
    """ASGI middleware that lets requests in or refuses them, and sends security headers with every response.

    Args:
        hosts: names by which clients may address the server, beside IP addresses; `*`: any.
        token: required of every request; None: of none.
        root_path: below which a proxy shows the page; requests come with it, or without it if the proxy removes it.
    """

    def __init__(self, app, hosts: list[str], token: str | None = None, root_path: str = ''):
        self.app, self.hosts, self.token = app, {host.lower() for host in hosts}, token
        self.root_path = root_path
        self.failed_tries = FailedTries()

    async def __call__(self, scope, receive, send) -> None:
        async def send_secured(message) -> None:
            if message['type'] == 'http.response.start':
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope['type'] != 'http':
            await self.app(scope, receive, send)
        else:
            scope = {**scope, 'root_path': self.root_path}
            request = Request(scope)
            answer = self.check_host(request) or self.check_site(request) or self.check_token(request) or self.app
            await answer(scope, receive, send_secured)

    def check_host(self, request: Request) -> Response | None:
        """Refuse a Host that is not a name of this server, against DNS rebinding by other sites; else return None.

        An IP address passes: rebinding needs a name.
        """
        match = HOST.fullmatch(request.headers.get('host', ''))
        host = (match['ipv6'] or match['name']).lower() if match else ''
        if '*' in self.hosts or host in self.hosts or is_address(host):
            return None
        return JSONResponse({'error': 'the server does not know this name as its own; start it with --allowed_host '
                             'NAME'}, 400)

    def check_site(self, request: Request) -> Response | None:
        """Refuse what another site's page sends or embeds; a link to the page passes.

        Browsers send Sec-Fetch-Site to HTTPS and to this machine, and Origin with each POST.
        """
        headers = request.headers
        is_link = request.method == 'GET' and headers.get('sec-fetch-mode') == 'navigate'
        is_foreign = headers.get('sec-fetch-site', 'none') not in ('none', 'same-origin') and not is_link
        origin = headers.get('origin')
        if is_foreign or origin is not None and origin.partition('://')[2] != headers.get('host'):
            return JSONResponse({'error': 'a page of another site may not use this server'}, 403)
        return None

    def check_token(self, request: Request) -> Response | None:
        """Refuse a request without the token; replace the token in the page's address by a cookie; else return None."""
        # The path that is routed. That of request.url depends on the Host header, which the client writes.
        path = request.scope['path'].removeprefix(self.root_path)
        if self.token is None or path in OPEN_PATHS:
            return None
        in_address = request.query_params.get('token')
        sent = (in_address or request.cookies.get('token')
                or request.headers.get('authorization', '').removeprefix('Bearer '))
        client = request.client.host if request.client else ''
        if sent and self.failed_tries.is_blocked(client):
            return JSONResponse({'error': f'too many wrong tokens; wait {TRY_SECONDS} seconds'}, 429,
                                {'Retry-After': str(TRY_SECONDS)})
        if not secrets.compare_digest(sent.encode(), self.token.encode()):
            if sent:
                self.failed_tries.add(client)
            return JSONResponse({'error': 'a token is required: open /?token=WORD'}, 401)
        if path != '/' or not in_address:
            return None
        response = RedirectResponse(f'{self.root_path}/', 303)  # the token does not stay in the address bar
        response.set_cookie('token', self.token, path=f'{self.root_path}/', httponly=True, samesite='strict',
                            secure=request.url.scheme == 'https', max_age=10**7)
        return response
