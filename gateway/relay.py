"""One HTTP request in, one stream of bytes out."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from gateway import headers as wire
from gateway.errors import (
    BadRequestError,
    BodyTooLargeError,
    GatewayError,
    OverloadedError,
    RequestTimeoutError,
    ResponseCutError,
    ShuttingDownError,
    UpstreamConnectionError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
    error_body,
    error_event,
    error_headers,
)
from gateway.sse import EventAligner

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("gateway.relay")

_NO_BODY = httpx.ByteStream(b"")


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Bounds of one exchange. Each time, in seconds, is for one phase; none is for the whole."""

    connect_timeout_s: float = 10.0
    first_byte_timeout_s: float = 600.0
    silence_timeout_s: float = 300.0
    max_body_bytes: int = 2 << 30
    max_open_streams: int = 4096
    sse_event_max_bytes: int = 1 << 20


class ClientLeftError(Exception):
    """The client closed its connection: nobody is left to answer."""


class Relay:
    """An ASGI application that passes each request to one upstream, and the answer back.

    `sandbox`, where given, answers the requests that carry `sandbox_key`.
    """

    def __init__(
        self,
        *,
        upstream_url: str,
        transport: httpx.AsyncBaseTransport,
        limits: RelayLimits,
        sandbox: httpx.AsyncBaseTransport | None = None,
        sandbox_key: str = "",
    ) -> None:
        self.url = httpx.URL(upstream_url)
        self.host = self.url.netloc
        self.base_path = self.url.raw_path.rstrip(b"/")
        self.limits = limits
        self.timeouts = {"connect": limits.connect_timeout_s}
        self.open_streams = 0
        self._exchanges: set[_Exchange] = set()
        self._transport = transport
        self._sandbox = sandbox
        self._sandbox_key = sandbox_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if wire.is_preflight(scope["method"], scope["headers"]):
            headers = wire.preflight(scope["headers"])
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body"})
        elif self.open_streams >= self.limits.max_open_streams:
            await send_error(send, OverloadedError("Too many open streams; try again soon.", retry_after_s=1))
        else:
            exchange = _Exchange(self, scope, receive, send)
            self.open_streams += 1
            self._exchanges.add(exchange)
            try:
                await exchange.run()
            finally:
                self._exchanges.discard(exchange)
                self.open_streams -= 1

    async def keep_time(self) -> None:
        """End the exchanges whose deadline has passed, until cancelled.

        One task looks at all of them now and then: a timer for each would cost each request more.
        """
        loop = asyncio.get_running_loop()
        limits = self.limits
        pause_s = min(1.0, limits.first_byte_timeout_s / 8, limits.silence_timeout_s / 8)
        while True:
            await asyncio.sleep(pause_s)
            now = loop.time()
            for exchange in [exchange for exchange in self._exchanges if exchange.deadline <= now]:
                exchange.give_up()

    async def drain(self, timeout_s: float) -> None:
        """Wait until every exchange has ended: those that the server has cancelled still say so."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.open_streams and loop.time() < deadline:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(0.01)

    def upstream_for(self, headers: wire.RawHeaders) -> httpx.AsyncBaseTransport:
        if self._sandbox is not None and wire.bearer_key(headers) == self._sandbox_key:
            return self._sandbox
        return self._transport


class _Exchange:
    """One request and its answer; `run` returns when the answer has been sent, or cannot be.

    `deadline` is a time of the loop's clock. Three things may end it early, each by cancelling the task that
    runs it: the client leaves, somebody is silent for too long, the server stops.
    """

    def __init__(self, relay: Relay, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - an ASGI application always runs in a task
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._relay = relay
        self._limits = relay.limits
        self._scope = scope
        self._receive = receive
        self._send = send
        self._started_at = time.perf_counter()
        self._cancelled_for: GatewayError | ClientLeftError | None = None
        self._stream: Any = None
        self._aligner: EventAligner | None = None
        self._head_sent = False
        self._ended = False
        self._waiting_for_client = True
        self.deadline = self._loop.time() + self._limits.silence_timeout_s

    async def run(self) -> None:
        try:
            response = await self._ask_upstream()
            await self._pass_on(response)
            self._ended = True
        except BaseException as exc:
            await self._fail(exc)

    # The way up

    async def _ask_upstream(self) -> httpx.Response:
        scope, relay = self._scope, self._relay
        headers, body_bytes = wire.to_upstream(scope["headers"], host=relay.host)
        body = await self._body(body_bytes)
        request = httpx.Request(
            scope["method"],
            relay.url,
            headers=headers,
            stream=body,
            extensions={"target": relay.base_path + scope["target"], "timeout": relay.timeouts},
        )
        request.method = scope["method"]  # httpx upper-cases it; methods are case-sensitive (RFC 9110 §9.1)
        self._asked_at = time.perf_counter()
        self._wait_for_upstream(self._limits.first_byte_timeout_s)
        response = await relay.upstream_for(scope["headers"]).handle_async_request(request)
        self._stream = response.stream
        return response

    async def _body(self, declared_bytes: int) -> httpx.AsyncByteStream:
        if declared_bytes == 0:
            self._watch_for_disconnect()
            return _NO_BODY
        if declared_bytes > self._limits.max_body_bytes:
            raise self._too_large()
        message = await self._receive_body()
        if message["more_body"]:
            return _Upload(self._rest_of_body(message))
        self._watch_for_disconnect()
        return httpx.ByteStream(message["body"])

    async def _rest_of_body(self, message: Message) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Runs in the upstream transport's time, perhaps beside the answer."""
        received_bytes = 0
        while True:
            received_bytes += len(message["body"])
            if received_bytes > self._limits.max_body_bytes:
                raise self._too_large()
            if message["body"]:
                self._wait_for_upstream(self._limits.first_byte_timeout_s)
                yield message["body"]
            if not message["more_body"]:
                break
            message = await self._receive_body()
        self._wait_for_upstream(self._limits.first_byte_timeout_s)
        self._watch_for_disconnect()

    async def _receive_body(self) -> Message:
        if not self._head_sent:
            self._waiting_for_client = True
            self.deadline = self._loop.time() + self._limits.silence_timeout_s
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        return message

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"The request body is larger than {self._limits.max_body_bytes} bytes.")

    # The way back

    async def _pass_on(self, response: httpx.Response) -> None:
        if not 200 <= response.status_code <= 599:
            raise UpstreamProtocolError(f"The upstream answered with status {response.status_code}.")
        # Our own transport's fields as they are; any other's from httpx's object.
        fields = response.extensions.get("raw_headers")
        headers, is_event_stream, has_trailers = wire.to_client(response.headers.raw if fields is None else fields)
        if is_event_stream:
            self._aligner = EventAligner(self._limits.sse_event_max_bytes)
            headers.append((b"x-accel-buffering", b"no"))
        headers.append((b"server-timing", self._server_timing()))
        self._head_sent = True
        self.deadline = math.inf
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": headers,
                "trailers": has_trailers,
            }
        )
        await self._pass_body()
        if has_trailers:
            trailers = getattr(self._stream, "trailers", [])
            await self._send({"type": "http.response.trailers", "headers": trailers})
        await self._stream.aclose()

    async def _pass_body(self) -> None:
        send, loop, silence_timeout_s = self._send, self._loop, self._limits.silence_timeout_s
        ready_part = self._aligner.feed if self._aligner else None
        self._wait_for_upstream(silence_timeout_s)
        async for chunk in self._stream:
            if ready_part is not None:
                chunk = ready_part(chunk)
            if chunk:
                # A client may take as long as it likes: only the upstream's silence is timed here.
                self.deadline = math.inf
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self.deadline = loop.time() + silence_timeout_s
        self.deadline = math.inf
        await send({"type": "http.response.body", "body": self._aligner.flush() if self._aligner else b""})

    def _server_timing(self) -> bytes:
        """Return how long the gateway and the upstream took until the answer began, in milliseconds."""
        # Not the loop's clock: uvloop's stands still within one turn of the loop.
        upstream_s = time.perf_counter() - self._asked_at
        own_s = self._asked_at - self._started_at
        return b"proxy;dur=%.2f, upstream;dur=%.2f" % (own_s * 1000, upstream_s * 1000)

    # Ends before the end

    async def _fail(self, exc: BaseException) -> None:
        error = self._failure(exc)
        self._ended = True
        if isinstance(exc, asyncio.CancelledError):
            self._task.uncancel()
        if self._stream is not None:
            # Shielded: a second cancellation must not keep the upstream's connection open.
            await asyncio.shield(self._stream.aclose())
        if isinstance(error, ClientLeftError):
            return
        if not self._head_sent:
            await send_error(self._send, error)
            return
        if self._aligner is not None:
            rest = self._aligner.flush()
            event = (rest + b"\n\n" if rest else b"") + error_event(error)
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        raise ResponseCutError(error.message) from exc

    def _failure(self, exc: BaseException) -> GatewayError | ClientLeftError:
        if isinstance(exc, asyncio.CancelledError):
            return self._cancelled_for or ShuttingDownError("The gateway is restarting; try again.", retry_after_s=1)
        if isinstance(exc, GatewayError | ClientLeftError):
            return exc
        if isinstance(exc, httpx.HTTPError):
            logger.warning("upstream failed: %s: %s", type(exc).__name__, exc)
            return _translated(exc)
        # Not expected: a defect of ours, which must neither leave a connection open nor a client waiting.
        logger.error("the relay failed", exc_info=exc)
        return GatewayError("Internal server error.")

    def _watch_for_disconnect(self) -> None:
        """Cancel this exchange when the client leaves; the request body must have been received."""
        self._scope["on_disconnect"](self._client_left)

    def _client_left(self) -> None:
        self._cancel(ClientLeftError())

    def _wait_for_upstream(self, timeout_s: float) -> None:
        self._waiting_for_client = False
        self.deadline = self._loop.time() + timeout_s

    def give_up(self) -> None:
        """Cancel this exchange: its deadline has passed."""
        if self._waiting_for_client:
            self._cancel(RequestTimeoutError("The request body stopped coming."))
        else:
            self._cancel(UpstreamTimeoutError("The upstream was silent for too long."))

    def _cancel(self, reason: GatewayError | ClientLeftError) -> None:
        if self._cancelled_for is None and not self._ended:
            self._cancelled_for = reason
            self._task.cancel()


class _Upload(httpx.AsyncByteStream):
    """A request body that is still arriving; can be read once."""

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._parts


def _translated(exc: httpx.HTTPError) -> GatewayError:
    """Return what the client is told of a failure between here and the upstream.

    The exception's own text stays in the log: it may name the operator's network.
    """
    if isinstance(exc, httpx.ConnectTimeout | httpx.PoolTimeout):
        return UpstreamTimeoutError("The upstream could not be connected to in time.")
    if isinstance(exc, httpx.TimeoutException):
        return UpstreamTimeoutError("The upstream did not answer in time.")
    if isinstance(exc, httpx.LocalProtocolError):
        return BadRequestError("The request cannot be passed on as it is.")
    if isinstance(exc, httpx.RemoteProtocolError):
        return UpstreamProtocolError("The upstream broke off, or answered with something that is not HTTP.")
    return UpstreamConnectionError("The connection to the upstream failed.")


def new_request_id() -> str:
    return f"req_{secrets.token_hex(16)}"


async def send_error(send: Send, error: GatewayError) -> None:
    """Send one whole answer of the gateway's own, readable by browsers of any origin."""
    body = error_body(error)
    headers = error_headers(error, request_id=new_request_id(), body_bytes=len(body)) + wire.CORS_HEADERS
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
