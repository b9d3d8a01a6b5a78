"""A request's body on its way up: whole where something of it is to be seen first, else part by part as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import httpx2 as httpx

from gateway import headers as wire
from gateway.asgi import Message
from gateway.errors import BodyTooLargeError
from gateway.seen_request import MOST_BODY_BYTES, SeenRequest

if TYPE_CHECKING:
    from gateway.relay import Relay

# What all bodies that metering waits for may hold together while they arrive. Beyond it larger ones go up as they
# come, unread: who sends bodies without end must neither fill memory nor keep others out.
_MOST_GATHERED_BYTES = 256 << 20
_SMALL_BODY_BYTES = 64 << 10


class RequestBody:
    """The body of one request, of which `receive` brings the next part, or raises.

    `on_part` is called with each part that goes up while others are still to come, `on_end` when the last has come.
    """

    def __init__(
        self,
        relay: Relay,
        seen: SeenRequest,
        *,
        receive: Callable[[], Awaitable[Message]],
        on_part: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._relay = relay
        self._seen = seen
        self._most_bytes = relay.limits.max_body_bytes
        self._receive = receive
        self._on_part = on_part
        self._on_end = on_end

    def too_large(self) -> BodyTooLargeError:
        return body_too_large(self._most_bytes)

    async def take(self, request: wire.ToUpstream) -> bytes | httpx.AsyncByteStream:
        """Return all of it, as it is to be sent, or a stream of what arrives. Raises BodyTooLargeError."""
        if request.body_bytes > self._most_bytes:
            raise self.too_large()
        if self._seen.wants_whole(request):
            return await self._whole_body(await self._receive())
        if self._seen.must_be_seen:
            message = await self._beginning(await self._receive())
            if message["more_body"]:
                return _Upload(self._rest_of_body(message))
            if len(message["body"]) > self._most_bytes:
                raise self.too_large()
            self._seen.take_part(message["body"])
            return message["body"]  # type: ignore[no-any-return]
        return _Upload(self._rest_of_body())  # the upstream may answer before any of it has come

    async def _beginning(self, message: Message) -> Message:
        """Return as much of a form as limits may have to see."""
        parts = [message["body"]]
        received_bytes = len(message["body"])
        while message["more_body"] and received_bytes <= MOST_BODY_BYTES:
            message = await self._receive()
            parts.append(message["body"])
            received_bytes += len(message["body"])
        form = b"".join(parts)
        self._seen.take_form(form)
        return {"body": form, "more_body": message["more_body"]}

    async def _whole_body(self, message: Message) -> bytes | httpx.AsyncByteStream:
        """Return a body that metering is to see first; one that turns out too long for that goes up as it comes."""
        received = message["body"]
        if message["more_body"]:
            is_whole, received = await self._gathered(message)
            if not is_whole:
                return _Upload(self._rest_of_body({"body": received, "more_body": True}))
        elif len(received) > self._most_bytes:
            raise self.too_large()
        return self._seen.take_whole(received)

    async def _gathered(self, message: Message) -> tuple[bool, bytes]:
        """Return the body and True; or its beginning and False, where there is no room to wait for the rest of it."""
        relay = self._relay
        received = bytearray()
        try:
            while True:
                received += message["body"]
                relay.gathered_bytes += len(message["body"])
                if len(received) > self._most_bytes:
                    raise self.too_large()
                if not message["more_body"]:
                    return True, bytes(received)
                is_crowded = relay.gathered_bytes > _MOST_GATHERED_BYTES and len(received) > _SMALL_BODY_BYTES
                if is_crowded or len(received) > MOST_BODY_BYTES:
                    return False, bytes(received)
                message = await self._receive()
        finally:
            relay.gathered_bytes -= len(received)

    async def _rest_of_body(self, begun: Message | None = None) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Runs in the upstream transport's time, perhaps beside the answer."""
        message = await self._receive() if begun is None else begun
        begun = None
        received_bytes = 0
        while True:
            part, has_more = message["body"], message["more_body"]
            received_bytes += len(part)
            if received_bytes > self._most_bytes:
                raise self.too_large()
            if part:
                self._seen.take_part(part)
                self._on_part()
                yield part
            if not has_more:
                break
            del part, message  # what has gone up is not to be held until the next has come
            message = await self._receive()
        self._on_end()


class _Upload(httpx.AsyncByteStream):
    """A request body that is still arriving; can be read once."""

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._parts


def body_too_large(most_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The request body is larger than {most_bytes} bytes.")
