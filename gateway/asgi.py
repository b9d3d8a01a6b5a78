"""What ASGI's messages are called here, and an answer of the gateway's own as such messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gateway import headers as wire
from gateway.errors import GatewayError, error_body, error_headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


async def send_error(send: Send, error: GatewayError, *, request_id: str = "") -> None:
    """Send one whole answer of the gateway's own, readable by browsers of any origin."""
    body = error_body(error)
    headers = error_headers(error, request_id=request_id, body_bytes=len(body)) + wire.CORS_HEADERS
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
