"""Who may ask: the holder of the token, by the name of this very machine; and what browsers may do with the answer."""

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
HEADERS = {
    "content-security-policy": _POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Lets through `/TOKEN/...` only, stripped of the token, and sets HEADERS on every answer.

    The name of the host in the request must be this machine's: a page elsewhere whose name was made to point here (DNS
    rebinding) has another one. Its port may differ, as behind `ssh -L`.

    Args:
        app: what answers.
        token: the first part of every address.
        host: that is listened on; other names than an address or localhost must be this one.
    """

    def __init__(self, app: App, token: str, host: str = "127.0.0.1") -> None:
        self.app, self.token, self.host = app, token.encode(), host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
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
            await _refuse(guarded, 403, "Open the whole address that `histossl view` has written.")
        elif not slash:
            await _answer(guarded, 307, b"", [(b"location", b"/" + self.token + b"/")])
        else:
            inner = dict(scope) | {"path": f"/{rest}", "root_path": "", "raw_path": None}
            await self.app(inner, receive, guarded)


def known_host(header: str, host: str) -> bool:
    """Whether a Host header names this machine: localhost or an address of it, or `host`, the one listened on."""
    try:
        name = header.rpartition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
        if name.lower() in ("localhost", host.lower()):
            return True
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or host not in ("127.0.0.1", "localhost", "::1")


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
