"""What ASGI's messages are called here, and an answer of the gateway's own as such messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Protocol

from gateway import headers as wire
from gateway.errors import GatewayError, error_body, error_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Memory:
    """What our own server keeps in `scope["memory"]` from one request of a connection to the next, for the gateway.

    `identity` is fingerprint and hint of the key in `authorization`: most clients send the same one again, and as long
    as its connection is open, the last request's fields are in memory anyway.
    """

    authorization = b""
    identity = ("", "")


class Shortcuts(Protocol):
    """What our own server offers in `scope["shortcuts"]` beside `receive` and `send`: the same, without waiting.

    An application that is given them may return None instead of something to await. It is then run by the callbacks of
    what it waits for, without a task, until it calls `start` or `end`. Whatever is put between it and the server, and
    would await None, must take them out of the scope.
    """

    def on_shutdown(self, callback: Callable[[], None]) -> None:
        """Have the callback called, at any moment until the end, where else the task would be cancelled."""

    def start(self, application: Coroutine[Any, Any, None]) -> None:
        """Go on in a task that runs this."""

    def end(self) -> None:
        """Forget the exchange, whose answer has been sent whole, or has nobody to go to."""

    def whole_body(self) -> bytes | None:
        """Return the request's body if all of it has arrived and nobody has received any of it, else None."""

    def has_left(self) -> bool:
        """Return whether the client is known to be gone, as one may be that has not sent all of its body."""

    def is_clogged(self) -> bool:
        """Return whether the client does not read what it has been sent: then only `send` waits for it."""

    def send_interim(self, status: int, reason: bytes | None, headers: wire.RawHeaders) -> None:
        """Send an interim answer ahead of the head; not to a client that knows none, or does not read."""

    def send_part(self, part: bytes) -> None:
        """Send a part of a body, neither empty nor its last, whose head was sent before."""

    def respond(
        self,
        status: int,
        reason: bytes | None,
        headers: wire.RawHeaders,
        body: bytes,
        *,
        body_bytes: int,
        has_date: bool,
    ) -> None:
        """Send a whole answer in one write.

        `reason` is the phrase behind the status, None for the usual one; `headers` are end-to-end fields; `body_bytes`
        is the length that they tell, -1 for none, and `has_date` whether they say when.
        """


async def send_error(send: Send, error: GatewayError, *, request_id: str = "") -> None:
    """Send one whole answer of the gateway's own, readable by browsers of any origin."""
    body = error_body(error)
    headers = error_headers(error, request_id=request_id, body_bytes=len(body)) + wire.CORS_HEADERS
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
