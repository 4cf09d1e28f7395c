"""Who may use a server: checked before a request or a socket reaches anything else."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from memflow.serve.settings import Settings

COOKIE = "memflow_token"
_OPEN = ("/health",)  # for whoever watches over the process
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """Refuses foreign names of the host, foreign pages, and whoever lacks the token.

    A name that somebody else's DNS points here (rebinding) is foreign even to a page that bears the same name; so the
    host must be an IP address, localhost or a name that was given.

    Args:
        app: what is behind.
        settings: token, origins and hosts.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.token = app, settings.token
        self.origins = {origin.rstrip("/").lower() for origin in settings.origins}
        named = {urlsplit(origin).hostname or "" for origin in self.origins}
        self.hosts = {"localhost", *named, *(host.lower() for host in settings.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            if refusal is None:
                await self.app(scope, receive, send)
            else:  # before it is accepted: the client sees 403
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
            return

        async def sealed(message):
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = message | {"headers": [*message.get("headers", []), *headers]}
            await send(message)

        if refusal is not None:
            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, sealed)
        elif self.token is not None and scope["path"] == "/" and _asked(scope):  # out of the address, into a cookie
            response = RedirectResponse("./", 303)
            secure = scope.get("scheme") == "https"
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", secure=secure)
            await response(scope, receive, sealed)
        else:
            await self.app(scope, receive, sealed)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_known(host):
            return 400, f"this server is not called {host[:100]!r}; --allow-origin names other addresses of it"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in self.origins and origin.partition("://")[2] != host:
            return 403, "pages of other sites may not use this server; --allow-origin lets them"
        if self.token is not None and scope["path"] not in _OPEN and not self._shows_token(scope, headers):
            return 401, "this server needs a token: open it as /?token=..., or send Authorization: Bearer ..."
        return None

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _shows_token(self, scope: Scope, headers: Headers) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        bearer = value.strip() if kind.lower() == "bearer" else None
        shown = (_asked(scope), HTTPConnection(scope).cookies.get(COOKIE), bearer)
        return any(hmac.compare_digest(one.encode(), self.token.encode()) for one in shown if one)


def _asked(scope: Scope) -> str | None:
    return HTTPConnection(scope).query_params.get("token")
