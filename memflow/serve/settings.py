"""What a server allows, and for how long: every limit stands here once, with its default. And whom it lets in: checked
before a request or a socket reaches anything else."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "memflow_token"
_OPEN = ("/health",)  # for whoever watches over the process
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        folder: where films and states are kept.
        model: name that clients may ask for.
        token: what a client must show; None: nothing.
        origins: other pages that may use the server, "https://example.org" for example.
        hosts: names that it may be called by, besides localhost and any IP address.
        sessions: stories told at the same time.
        prompt_characters: of a prompt.
        message_characters: of a message.
        start_seconds: until session.start has to be there.
        send_seconds: that one send may take.
        stall_seconds: without a message and without a chunk until a connection ends.
        messages_per_second: read from one connection; it waits for the rest.
        scenes_per_second: prompts of one connection; further ones are refused.
        scenes: prompts of one connection in all.
        story_seconds: of video in a story.
        bank_frames: that a story may ask for.
        held_frames: that a story may ask for.
        disk_bytes: of all films and states together.
        keep_seconds: that a story can be resumed for after its last change.
        save_every: chunks after which the state is written too, for a process that is killed; 0: never.
    """

    folder: Path
    model: str = "storybook"
    token: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    sessions: int = 8
    prompt_characters: int = 2000
    message_characters: int = 128 * 1024
    start_seconds: float = 10.0
    send_seconds: float = 8.0
    stall_seconds: float = 60.0
    messages_per_second: float = 50.0
    scenes_per_second: float = 2.0
    scenes: int = 4096
    story_seconds: float = 3600.0
    bank_frames: int = 16
    held_frames: int = 1024
    disk_bytes: int = 20 * 10**9
    keep_seconds: float = 86400.0
    save_every: int = 50

    def public(self) -> dict:
        """The limits that a client may know."""
        hidden = ("folder", "model", "token", "origins", "hosts")
        return {name: value for name, value in vars(self).items() if name not in hidden}


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
