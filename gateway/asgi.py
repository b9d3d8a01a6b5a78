"""What ASGI's messages are called here, and an answer of the gateway's own as such messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from gateway import headers as wire
from gateway.errors import GatewayError, error_body, error_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Shortcuts(Protocol):
    """What our own server offers in `scope["shortcuts"]` beside `receive` and `send`: the same, without waiting."""

    def whole_body(self) -> bytes | None:
        """Return the request's body if all of it has arrived and nobody has received any of it, else None."""

    def is_clogged(self) -> bool:
        """Return whether the client does not read what it has been sent: then only `send` waits for it."""

    def send_part(self, part: bytes) -> None:
        """Send a part of a body, neither empty nor its last, whose head was sent before."""

    def respond(self, status: int, headers: wire.RawHeaders, body: bytes, *, body_bytes: int, has_date: bool) -> None:
        """Send a whole answer in one write.

        `headers` are end-to-end fields; `body_bytes` is the length that they tell, -1 for none, and `has_date` whether
        they say when.
        """


async def send_error(send: Send, error: GatewayError, *, request_id: str = "") -> None:
    """Send one whole answer of the gateway's own, readable by browsers of any origin."""
    body = error_body(error)
    headers = error_headers(error, request_id=request_id, body_bytes=len(body)) + wire.CORS_HEADERS
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
