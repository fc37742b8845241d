"""Who may use serve.py: the server's own name as Host, no request that another site sends, and the token."""
import re
import secrets

from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import Request

OPEN_PATHS = {'/health'}  # need no token
HOST = re.compile(r'(\[[0-9a-f:.]+\]|[\w.-]+)(:\d+)?', re.IGNORECASE)
SECURITY_HEADERS = {
    'Content-Security-Policy': "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; style-src "
    "'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer'}


class Guard:
    """ASGI middleware that lets requests in or refuses them, and sends security headers with every response.

    Args:
        hosts: names by which clients may address the server; `*`: any.
        token: required of every request; None: of none.
    """

    def __init__(self, app, hosts: list[str], token: str | None = None):
        self.app, self.hosts, self.token = app, {host.lower() for host in hosts}, token

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
            request = Request(scope)
            answer = self.check_host(request) or self.check_token(request) or self.app
            await answer(scope, receive, send_secured)

    def check_host(self, request: Request) -> Response | None:
        """Refuse a Host that is not a name of this server, against DNS rebinding by other sites; else return None."""
        host = HOST.fullmatch(request.headers.get('host', ''))
        if '*' in self.hosts or host and host[1].lower() in self.hosts:
            return None
        return JSONResponse({'error': 'this is not a name of the server'}, 400)

    def check_token(self, request: Request) -> Response | None:
        """Refuse a request without the token; replace the token in the page's address by a cookie; else return None."""
        # The path that is routed. That of request.url depends on the Host header, which the client writes.
        path = request.scope['path']
        if self.token is None or path in OPEN_PATHS:
            return None
        in_address = request.query_params.get('token')
        sent = (in_address or request.cookies.get('token')
                or request.headers.get('authorization', '').removeprefix('Bearer '))
        if not secrets.compare_digest(sent.encode(), self.token.encode()):
            return JSONResponse({'error': 'a token is required: open /?token=WORD'}, 401)
        if path != '/' or not in_address:
            return None
        response = RedirectResponse('/', 303)  # the token does not stay in the address bar
        response.set_cookie('token', self.token, httponly=True, samesite='strict', max_age=10**7)
        return response
