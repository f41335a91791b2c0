"""At the door: who may come in, and what every answer tells the browser to beware of."""

import secrets
from collections.abc import Mapping

from fastapi import Request, Response
from fastapi.responses import RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from locally.page.web.identity import Identity
from locally.page.web.subscribing import OPEN

TOKEN_COOKIE = "locally-token"
HEADERS: Mapping[str, str] = {
    # plots carry their styles inline, hence 'unsafe-inline' there; scripts come from a file of ours only
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """Turns away who brings neither token nor name, where one of them is asked for; marks what goes out."""

    def __init__(self, app: ASGIApp, token: str | None, identity: Identity) -> None:
        self.app, self.token, self.identity = app, token, identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self._instead(Request(scope)) or self.app)(scope, receive, marked)

    def _instead(self, request: Request) -> Response | None:
        """What to answer without asking the application, if anything."""
        if request.url.path.startswith(OPEN):
            return None
        if self.token is not None and not _knows(request, self.token):
            return Response("this page needs its token: open the address that `locally serve` printed", 401)
        if self.identity.user_header and not self.identity.user(request):
            return Response(f"this page is for people whom a reverse proxy names in {self.identity.user_header}", 401)
        if self.token is not None and "token" in request.query_params:
            response = RedirectResponse(request.url.path, 303)  # keep the secret out of the address bar
            response.set_cookie(TOKEN_COOKIE, self.token, httponly=True, samesite="strict")
            return response
        return None


def _knows(request: Request, token: str) -> bool:
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    offered = (request.query_params.get("token", ""), request.cookies.get(TOKEN_COOKIE, ""), bearer)
    return any(secrets.compare_digest(o.encode(), token.encode()) for o in offered)
