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

from billing.events import Outcome
from gateway import headers as wire
from gateway.decoding import Decoder
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
from gateway.metering import MOST_BODY_BYTES, Metering, RequestMeter
from gateway.outgoing import OutgoingRequest
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
    # What may still be read of an answer after its client has left, for its true usage; 0 s: nothing.
    drain_timeout_s: float = 0.0
    drain_max_bytes: int = 16 << 20


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
        metering: Metering,
        sandbox: httpx.AsyncBaseTransport | None = None,
        sandbox_key: str = "",
    ) -> None:
        self.metering = metering
        self.url = httpx.URL(upstream_url)
        self.host = self.url.netloc
        self.base_path = self.url.raw_path.rstrip(b"/")
        self.limits = limits
        self.timeouts: dict[str, float | None] = {"connect": limits.connect_timeout_s}
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
            await self.metering.begin(scope).finish("refused", status=OverloadedError.status)
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
            for exchange in [exchange for exchange in self._exchanges if exchange.is_overdue(now)]:
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
        self._meter = relay.metering.begin(scope)
        self._cancelled_for: GatewayError | ClientLeftError | None = None
        self._stream: Any = None
        self._aligner: EventAligner | None = None
        self._decoder: Decoder | None = None
        self._head_sent = False
        self._ended = False
        self._client_left_at = 0.0
        self._drains_until_byte = 0
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
        self._meter.check_not_blocked()
        headers, body_bytes = wire.to_upstream(scope["headers"], host=relay.host)
        body = await self._body(headers, body_bytes)
        request = OutgoingRequest(
            scope["method"],
            relay.url,
            fields=headers,
            stream=body,
            target=relay.base_path + scope["target"],
            timeout=relay.timeouts,
        )
        self._meter.asked_s = time.perf_counter()
        self._wait_for_upstream(self._limits.first_byte_timeout_s)
        response = await relay.upstream_for(scope["headers"]).handle_async_request(request)
        self._stream = response.stream
        return response

    async def _body(self, headers: wire.RawHeaders, declared_bytes: int) -> httpx.AsyncByteStream:
        if declared_bytes == 0:
            self._watch_for_disconnect()
            return _NO_BODY
        if declared_bytes > self._limits.max_body_bytes:
            raise self._too_large()
        message = await self._receive_body()
        if not self._meter.wants_whole_body(headers, declared_bytes):
            if message["more_body"]:
                return _Upload(self._rest_of_body(message))
            self._meter.take_part(message["body"])
            self._watch_for_disconnect()
            return httpx.ByteStream(message["body"])
        return await self._whole_body(headers, message)

    async def _whole_body(self, headers: wire.RawHeaders, message: Message) -> httpx.AsyncByteStream:
        """Return a body that metering is to see first; one that turns out too long for that goes up as it comes."""
        parts = []
        received_bytes = 0
        while True:
            parts.append(message["body"])
            received_bytes += len(message["body"])
            if received_bytes > self._limits.max_body_bytes:
                raise self._too_large()
            if not message["more_body"]:
                break
            if received_bytes > MOST_BODY_BYTES:
                return _Upload(self._rest_of_body({"body": b"".join(parts), "more_body": True}))
            message = await self._receive_body()
        received = b"".join(parts)
        body = self._meter.take_body(received)
        if len(body) != len(received):
            _declare_length(headers, len(body))
        self._watch_for_disconnect()
        return httpx.ByteStream(body)

    async def _rest_of_body(self, message: Message) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Runs in the upstream transport's time, perhaps beside the answer."""
        received_bytes = 0
        while True:
            received_bytes += len(message["body"])
            if received_bytes > self._limits.max_body_bytes:
                raise self._too_large()
            if message["body"]:
                self._meter.take_part(message["body"])
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
        answer = wire.to_client(response.headers.raw if fields is None else fields)
        meter = self._meter
        if meter.is_spliced and answer.content_encoding:
            answer = self._unpacked(answer)
        meter.take_head(response.status_code, answer)
        headers = answer.headers
        if answer.is_event_stream:
            self._aligner = EventAligner(self._limits.sse_event_max_bytes)
            headers.append((b"x-accel-buffering", b"no"))
        headers.append((b"server-timing", self._server_timing()))
        if answer.body_bytes == 0 or self._scope["method"] == "HEAD" or response.status_code in (204, 304):
            await self._finish()  # the head is all that the client waits for
        self._head_sent = True
        self.deadline = math.inf
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "headers": headers,
                "trailers": answer.has_trailers,
            }
        )
        if self._aligner is not None:
            await self._pass_events(self._aligner)
        else:
            await self._pass_chunks(answer.body_bytes)
        if answer.has_trailers:
            trailers = getattr(self._stream, "trailers", [])
            await self._send({"type": "http.response.trailers", "headers": trailers})
        await self._stream.aclose()

    def _unpacked(self, answer: wire.ToClient) -> wire.ToClient:
        """Return the head of a compressed event stream as it is once unpacked.

        The usage event that this gateway asked for cannot be taken out of compressed bytes.
        """
        decoder = Decoder(answer.content_encoding)
        if decoder.gave_up or answer.content_type[:17].lower() != b"text/event-stream":
            return answer
        self._decoder = decoder
        headers = [pair for pair in answer.headers if pair[0].lower() not in (b"content-encoding", b"content-length")]
        return answer._replace(headers=headers, is_event_stream=True, content_encoding=b"", body_bytes=-1)

    async def _pass_events(self, aligner: EventAligner) -> None:
        send, meter, loop, silence_timeout_s = self._send, self._meter, self._loop, self._limits.silence_timeout_s
        removes_usage = meter.removes_usage
        self._wait_for_upstream(silence_timeout_s)
        async for chunk in self._stream:
            if self._decoder is not None:
                chunk = self._decoded(chunk)
            meter.feed(chunk)
            events = aligner.feed(chunk)
            if events:
                if meter.may_be_last(events):
                    await self._finish()
                if removes_usage:
                    events = meter.without_usage(events)
                # A client may take as long as it likes: only the upstream's silence is timed here.
                self.deadline = math.inf
                await send({"type": "http.response.body", "body": events, "more_body": True})
            self.deadline = loop.time() + silence_timeout_s
        self.deadline = math.inf
        await self._finish()
        rest = aligner.flush()
        await send({"type": "http.response.body", "body": meter.without_usage(rest) if rest else b""})

    async def _pass_chunks(self, body_bytes: int) -> None:
        send, meter, loop, silence_timeout_s = self._send, self._meter, self._loop, self._limits.silence_timeout_s
        self._wait_for_upstream(silence_timeout_s)
        async for chunk in self._stream:
            meter.feed(chunk)
            self.deadline = math.inf
            body_bytes -= len(chunk)
            if body_bytes == 0:
                await self._finish()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self.deadline = loop.time() + silence_timeout_s
        self.deadline = math.inf
        await self._finish()
        await send({"type": "http.response.body"})

    async def _finish(self) -> None:
        """Meter the whole answer: the upstream has ended it, the client is about to hold it."""
        outcome: Outcome = "client_closed" if self._client_left_at else "completed"
        await self._meter.finish(outcome, is_whole=True)

    def _decoded(self, chunk: bytes) -> bytes:
        assert self._decoder is not None  # noqa: S101 - asked for only then
        decoded = self._decoder.feed(chunk)
        if self._decoder.gave_up:
            raise UpstreamProtocolError("The upstream's compressed answer cannot be read.")
        return decoded

    def _server_timing(self) -> bytes:
        """Return how long the gateway and the upstream took until the answer began, in milliseconds."""
        # Not the loop's clock: uvloop's stands still within one turn of the loop.
        meter = self._meter
        upstream_s = time.perf_counter() - meter.asked_s
        own_s = meter.asked_s - meter.started_s
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
        status = error.status if isinstance(error, GatewayError) and not self._head_sent else None
        await self._meter.finish(_outcome(error, self._meter), status=status)
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
        limits = self._limits
        if limits.drain_timeout_s and self._meter.tells_usage_at_its_end():
            # Whatever is sent from now on goes nowhere; the upstream is read on for the usage that it reports.
            self._client_left_at = self._loop.time()
            self._drains_until_byte = self._meter.response_bytes + limits.drain_max_bytes
        else:
            self._cancel(ClientLeftError())

    def is_overdue(self, now: float) -> bool:
        """Return whether somebody was silent for too long, or an answer has been read for long enough for nobody."""
        if not self._client_left_at:
            return self.deadline <= now
        drained_s = now - self._client_left_at
        return drained_s >= self._limits.drain_timeout_s or self._meter.response_bytes > self._drains_until_byte

    def _wait_for_upstream(self, timeout_s: float) -> None:
        self._waiting_for_client = False
        self.deadline = self._loop.time() + timeout_s

    def give_up(self) -> None:
        """Cancel this exchange: its deadline has passed."""
        if self._client_left_at:
            self._cancel(ClientLeftError())
        elif self._waiting_for_client:
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


def _declare_length(headers: wire.RawHeaders, body_bytes: int) -> None:
    for index, (name, _) in enumerate(headers):
        if name == b"content-length":
            headers[index] = (name, b"%d" % body_bytes)


def _outcome(error: GatewayError | ClientLeftError, meter: RequestMeter) -> Outcome:
    if isinstance(error, ClientLeftError):
        return "client_closed"
    if isinstance(error, UpstreamTimeoutError | ShuttingDownError) and meter.asked_s:
        return "timeout"
    if isinstance(error, UpstreamConnectionError | UpstreamProtocolError | UpstreamTimeoutError):
        return "upstream_error"
    return "refused"


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
