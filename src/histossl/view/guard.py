"""Access control of the viewer: the secret token, the host name of the request, and security headers."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": _POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Passes only requests to `/TOKEN/...`, without the token, and sets HEADERS on every response.

    The Host header must name this machine. This stops DNS rebinding: a foreign page whose name was made to resolve to
    this machine sends its own name. The port may differ, as behind `ssh -L`.

    Args:
        app: the application behind the guard.
        token: the first part of every address.
        host: the host that the server listens on; a Host header that is a name must be this one or localhost.
    """

    def __init__(self, app: App, token: str, host: str = "127.0.0.1") -> None:
        self.app, self.token, self.host = app, token.encode(), host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI defines it.

        Args:
            scope: type, path and headers of the request.
            receive: gives the messages of the request.
            send: takes the messages of the response.
        """
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        guarded = _with_headers(send)
        head = dict(scope["headers"])
        if not known_host(head.get(b"host", b"").decode("latin-1"), self.host):
            await _refuse(guarded, 400, "This is not the name of the machine that histossl runs on.")
            return
        first, slash, rest = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(first.encode("utf-8", "replace"), self.token):
            await _refuse(guarded, 403, "Open the whole address that `histossl view` has printed.")
        elif not slash:
            await _answer(guarded, 307, b"", [(b"location", b"/" + self.token + b"/")])
        else:
            inner = dict(scope) | {"path": f"/{rest}", "root_path": "", "raw_path": None}
            await self.app(inner, receive, guarded)


def known_host(header: str, host: str) -> bool:
    """Whether a Host header names this machine.

    Args:
        header: the Host header, with or without a port.
        host: the host that the server listens on.

    Returns:
        True for localhost, for `host`, and for a loopback address; for any address where the server does not listen on
        a loopback address.
    """
    try:
        name = header.rpartition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
        if name.lower() in ("localhost", host.lower()):
            return True
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or host not in LOOPBACK


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return guarded


async def _refuse(send: Send, status: int, text: str) -> None:
    await _answer(send, status, text.encode(), [(b"content-type", b"text/plain; charset=utf-8")])


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
