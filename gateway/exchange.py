"""One HTTP request in, one stream of bytes out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import httpx2 as httpx

from billing.events import Outcome
from gateway import headers as wire
from gateway.answer import Answer, Interim
from gateway.asgi import Message, Receive, Scope, Send, Shortcuts, send_error
from gateway.decoding import Decoder
from gateway.endings import ClientLeftError, failure_of, outcome_of, shutting_down
from gateway.errors import (
    GatewayError,
    RequestTimeoutError,
    ResponseCutError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
    error_event,
)
from gateway.head import head_of
from gateway.outgoing import OutgoingRequest
from gateway.passage import Passage
from gateway.request_body import RequestBody, body_too_large
from gateway.transport import PooledTransport
from proxysite.logs import current_request_id

if TYPE_CHECKING:
    from gateway.relay import Relay


class Exchange:
    """One request and its answer; `run` returns when the answer has been sent, or cannot be.

    `deadline` is a time of the loop's clock. Three things may end it early, each by cancelling the task that
    runs it: the client leaves, somebody is silent for too long, the server stops.

    Most requests need no task: `begin` sends them upstream in the turn in which they came, and `Arrivals` has them
    answered in the turn in which the whole answer came. Whatever else happens to them starts the task.
    """

    # Defaults of the class, not of each exchange: most come to their end as they are.
    deadline = math.inf
    _task: asyncio.Task[Any] | None = None
    _outgoing: OutgoingRequest | None = None
    _cancelled_for: GatewayError | ClientLeftError | None = None
    _is_deferred = False
    _has_arrived = False  # whole, and is yet to be taken
    _failed: Exception | None = None  # before there was a task
    _stream: Any = None
    _answer: wire.ToClient | None = None
    _has_body = True
    _whole: bytes | None = None
    _counting: Awaitable[None] | None = None
    _passage: Passage | None = None
    _decoder: Decoder | None = None
    _head_sent = False
    _ended = False
    has_lost_client = False  # and the upstream is read on for nobody
    _interims = 0
    _drains_until_byte: float = math.inf
    _waiting_for_client = True

    def __init__(self, relay: Relay, scope: Scope, receive: Receive, send: Send) -> None:
        self.loop = relay.loop or relay.find_loop()
        self._relay = relay
        self.limits = relay.limits
        self._scope = scope
        self._receive = receive
        self._send = send
        self._shortcuts: Shortcuts | None = scope.get("shortcuts")
        self._meter = relay.metering.begin(scope)

    def begin(self) -> bool:
        """Do what can be done without waiting; return whether nothing is left but to wait for the upstream.

        Then this object has deferred itself, as `Shortcuts` says; else `run` is to be awaited. Never raises.
        """
        relay, meter, shortcuts = self._relay, self._meter, self._shortcuts
        if shortcuts is None:
            return False
        shortcuts.on_shutdown(self._shut_down)
        if relay.limiter is not None:
            return False
        try:
            request = wire.to_upstream(self._scope["headers"], host=relay.host, plan=self._scope.get("plan"))
            meter.check_not_blocked()
            body = self._arrived_body(request) if request.body_bytes != 0 else b""
            if body is None:
                return False
            self._outgoing = outgoing = self._outgoing_of(request, body)
            if self._cancelled_for is not None:
                return False
            transport = relay.upstream_for(meter)
            meter.asked_s = time.perf_counter()
            if not isinstance(transport, PooledTransport):
                return False
            if not transport.begin(outgoing):
                return False
            outgoing.say_sent()
            self._is_deferred = True
            outgoing.answer.reader = self
        except Exception as exc:  # whatever it is, the task tells the client
            self._failed = exc
        return self._is_deferred

    def _start(self) -> None:
        """Go on in a task after all."""
        shortcuts, outgoing = self._shortcuts, self._outgoing
        if self._is_deferred and shortcuts is not None and outgoing is not None:
            self._is_deferred = False
            outgoing.answer.reader = None
            shortcuts.start(self.run())

    def _shut_down(self) -> None:
        self._cancel(shutting_down())

    async def run(self) -> None:
        # Told the loop, Python need not look for it: before 3.12 that is a system call.
        self._task = asyncio.current_task(self.loop)
        current_request_id.set(self._meter.request_id)
        try:
            reason, self._failed = self._failed or self._cancelled_for, None
            if reason is not None:
                raise reason
            response = await self._ask_upstream()
            await self._pass_on(response)
            self._ended = True
        except BaseException as exc:
            await self._fail(exc)
        finally:
            self._passage = None  # it leads back here: a cycle for the garbage collector
            self._settle()

    # The way up

    async def _ask_upstream(self) -> httpx.Response:
        outgoing, has_begun = self._outgoing, True
        if outgoing is None:
            outgoing, has_begun = await self._received_request(), False
        transport = self._relay.upstream_for(self._meter)
        if not isinstance(transport, PooledTransport):
            self._meter.is_sent = True  # nobody says when
            response = await transport.handle_async_request(outgoing)
        else:
            outgoing.on_interim = self.take_interim
            pending = transport.complete(outgoing) if has_begun else transport.handle_async_request(outgoing)
            response = await pending
        self._stream = response.stream
        return response

    async def _received_request(self) -> OutgoingRequest:
        """Return what is to go upstream, once enough of it is there and it is admitted."""
        scope, relay, meter = self._scope, self._relay, self._meter
        if self._shortcuts is not None and self._shortcuts.has_left():
            raise ClientLeftError
        # First: of two keys neither is the one that limits could be asked about.
        request = wire.to_upstream(scope["headers"], host=relay.host, plan=scope.get("plan"))
        meter.check_not_blocked()
        limiter = relay.limiter
        if limiter is not None:
            limiter.screen_request(meter, scope)
        body: bytes | httpx.AsyncByteStream = b""
        if request.body_bytes != 0:
            arrived = self._arrived_body(request)
            if arrived is not None:
                body = arrived
            elif limiter is None:
                body = await self._body().take(request)
            else:
                with limiter.uploading(meter, scope):
                    body = await self._body().take(request)
        outgoing = self._outgoing_of(request, body)
        if limiter is not None:
            await limiter.admit(meter, scope)
        meter.asked_s = time.perf_counter()
        return outgoing

    def _outgoing_of(self, request: wire.ToUpstream, body: bytes | httpx.AsyncByteStream) -> OutgoingRequest:
        """Return the request to send, with its body or what there is of it; from here on the upstream is waited for."""
        relay, meter = self._relay, self._meter
        length = request.body_bytes
        if isinstance(body, bytes):
            self._watch_for_disconnect()
            if meter.seen.is_spliced and length > 0:
                length = len(body)
                wire.declare_length(request.headers, length)
        self.wait_for_upstream(self.limits.first_byte_timeout_s)
        return OutgoingRequest(
            self._scope["method"],
            relay.url,
            fields=request.headers,
            length=length,
            body=body,
            target=relay.target_for(meter, self._scope["target"]) if relay.base_path else self._scope["target"],
            timeout=relay.timeouts,
            on_sent=meter.look,
        )

    def _arrived_body(self, request: wire.ToUpstream) -> bytes | None:
        """Return the body to send where all of it is here already and nothing has to be waited for, else None."""
        seen, shortcuts = self._meter.seen, self._shortcuts
        if shortcuts is None or request.body_bytes > self.limits.max_body_bytes or seen.must_be_seen:
            return None
        body = shortcuts.whole_body()
        if body is None:
            return None
        if len(body) > self.limits.max_body_bytes:
            raise body_too_large(self.limits.max_body_bytes)
        if seen.wants_whole(request):
            return seen.take_whole(body)
        seen.take_part(body)
        return body

    def _body(self) -> RequestBody:
        def on_part() -> None:
            self.wait_for_upstream(self.limits.first_byte_timeout_s)

        def on_end() -> None:
            on_part()
            self._watch_for_disconnect()

        return RequestBody(self._relay, self._meter.seen, receive=self._receive_body, on_part=on_part, on_end=on_end)

    async def _receive_body(self) -> Message:
        if not self._head_sent:
            self._waiting_for_client = True
            self.deadline = self.loop.time() + self.limits.silence_timeout_s
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        return message

    # The way back

    def take_interim(self, interim: Interim) -> None:
        """Pass on that the upstream is at work; no time limit is moved by it, and no more than so many of them pass."""
        self._interims += 1
        if self._shortcuts is not None and self._interims <= self.limits.max_interim_answers:
            headers = wire.interim_to_client(interim.fields)
            self._shortcuts.send_interim(interim.status, interim.reason, headers)

    def arrived(self) -> None:
        """Have the answer sent with the others of this turn if all of it has come, else go on in a task."""
        outgoing = self._outgoing
        if outgoing is not None and outgoing.answer.is_whole and outgoing.answer.status <= 599:
            self._has_arrived = True
            self.deadline = math.inf  # nobody is waited for any more, however late the loop looks at the time
            self._relay.arrivals.add(self)
        else:
            self._start()

    def take_answer(self) -> bool:
        """Meter the answer, which has come whole; return whether `send_answer` may follow.

        What has to be waited for is left to a task.
        """
        outgoing = self._outgoing
        self._has_arrived = False
        if outgoing is None:
            return False
        self._stream = answer = outgoing.answer
        try:
            self._take_head(answer.status, answer.fields)
            if self._take_whole() and self._counting is None:
                return True
        except Exception as exc:  # whatever it is, the task tells the client
            self._failed = exc
        self._start()
        return False

    def send_answer(self) -> None:
        """Send what `take_answer` has taken, and end."""
        try:
            self._respond(self._stream.reason)
            self._ended = True
            self._settle()
            if self._shortcuts is not None:
                self._shortcuts.end()
        except Exception as exc:  # whatever it is, the task tells the client
            self._failed = exc
            self._start()

    def _settle(self) -> None:
        self._meter.settle()
        self._relay.exchanges.discard(self)

    async def _pass_on(self, response: httpx.Response) -> None:
        if self._answer is None:
            if not 200 <= response.status_code <= 599:
                raise UpstreamProtocolError(f"The upstream answered with status {response.status_code}.")
            # Our own transport's fields as they are; any other's from httpx's object.
            fields = response.extensions.get("raw_headers")
            self._take_head(response.status_code, response.headers.raw if fields is None else fields)
            self._take_whole()
        # None of one that HTTP/2 or the sandbox has brought, where there are none.
        reason = response.extensions.get("reason_phrase")
        if self._whole is None:
            await self._pass_parts(reason)
        elif not self._head_sent:
            self.deadline = math.inf
            await self._count()
            self._respond(reason)

    def _take_head(self, status: int, fields: wire.RawHeaders) -> None:
        head = head_of(status, fields, method=self._scope["method"], meter=self._meter)
        self._answer, self._has_body, self._decoder = head

    def _take_whole(self) -> bool:
        """Take the body, and meter the answer, where the server can send both at once and all of it is here.

        Then `_counting` is to be awaited, if there is any, before `_respond`.
        """
        shortcuts, stream, answer = self._shortcuts, self._stream, self._answer
        if shortcuts is None or answer is None or not isinstance(stream, Answer):
            return False
        if not self._has_body or answer.is_event_stream or answer.has_trailers or shortcuts.is_clogged():
            return False
        self._whole = body = stream.whole()
        if body is None:
            return False
        if body:
            self._meter.feed(body)
        self._counting = self._meter.finish_soon(self._outcome_at_end(), is_whole=True)
        return True

    async def _count(self) -> None:
        counting, self._counting = self._counting, None
        if counting is not None:
            await counting

    def _respond(self, reason: bytes | None) -> None:
        answer, body = self._answer, self._whole
        if self._shortcuts is not None and answer is not None and body is not None:
            self._head_sent = True
            self._shortcuts.respond(
                self._meter.status, reason, answer.headers, body, body_bytes=answer.body_bytes, has_date=answer.has_date
            )

    async def _pass_parts(self, reason: bytes | None) -> None:
        answer = self._answer
        assert answer is not None  # noqa: S101 - see _pass_on
        if not self._has_body:
            await self.finish()  # the head is all that the client waits for
        stream = self._stream
        self._passage = passage = Passage(
            self, stream, answer, self._decoder, meter=self._meter, send=self._send, shortcuts=self._shortcuts
        )
        self._head_sent = True
        self.deadline = math.inf
        # Where no length is told, trailers may come that nobody has announced.
        may_have_trailers = answer.has_trailers or answer.body_bytes < 0
        await self._send(
            {
                "type": "http.response.start",
                "status": self._meter.status,
                "headers": answer.headers,
                "trailers": may_have_trailers,
                # The upstream's phrase, and what need not be sent apart: for our own server; any other looks past it.
                "reason": reason,
                "body_follows": self._has_body and getattr(stream, "has_more", False) and not answer.is_event_stream,
            }
        )
        await passage.run()
        if may_have_trailers:
            trailers = wire.trailers_to_client(getattr(stream, "trailers", []))
            await self._send({"type": "http.response.trailers", "headers": trailers})
        await stream.aclose()

    async def finish(self) -> None:
        """Meter the whole answer: the upstream has ended it, the client is about to hold it."""
        await self._meter.finish(self._outcome_at_end(), is_whole=True)

    def _outcome_at_end(self) -> Outcome:
        return "client_closed" if self.has_lost_client else "completed"

    # Ends before the end

    async def _fail(self, exc: BaseException) -> None:
        error = failure_of(exc, cancelled_for=self._cancelled_for)
        self._ended = True
        if isinstance(exc, asyncio.CancelledError) and self._task is not None:
            self._task.uncancel()
        try:
            # Shielded: a second cancellation must not keep the upstream's connection open.
            if self._stream is not None:
                await asyncio.shield(self._stream.aclose())
            elif self._outgoing is not None:
                await asyncio.shield(self._outgoing.abandon())
            await self._count()
        finally:  # nor keep the request from being told of
            if isinstance(error, GatewayError):
                self._relay.metering.tally.failed(error.code)
            status = error.status if isinstance(error, GatewayError) and not self._head_sent else None
            await self._meter.finish(outcome_of(error, was_asked=self._meter.asked_s > 0), status=status)
        if isinstance(error, ClientLeftError) or (self._whole is not None and self._head_sent):
            return
        if not self._head_sent:
            await send_error(self._send, error, request_id=self._meter.request_id)
            return
        rest = None if self._passage is None else self._passage.rest()
        if rest is not None:
            event = rest + error_event(error)
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        raise ResponseCutError(error.message) from exc

    def _watch_for_disconnect(self) -> None:
        """Cancel this exchange when the client leaves; the request body must have been received."""
        self._scope["on_disconnect"](self._client_left)

    def _client_left(self) -> None:
        reads_on_s = self._meter.worth_reading_on_s(self.limits.drain_timeout_s)
        if reads_on_s:
            # Whatever is sent from now on goes nowhere; the upstream is read on for the usage that it reports.
            self.has_lost_client = True
            self._drains_until_byte = self._meter.response_bytes + self.limits.drain_max_bytes
            self.loop.call_later(reads_on_s, self.give_up)
        else:
            self._cancel(ClientLeftError())

    def is_overdue(self, now: float) -> bool:
        """Return whether somebody was silent for too long; an answer that is read for nobody has a time of its own."""
        return self.deadline <= now and not self.has_lost_client

    def check_drain(self) -> None:
        """Raise ClientLeftError where enough was read for a client that has left."""
        if self._meter.response_bytes > self._drains_until_byte:
            raise ClientLeftError

    def wait_for_upstream(self, timeout_s: float) -> None:
        self._waiting_for_client = False
        self.deadline = self.loop.time() + timeout_s

    def give_up(self) -> None:
        """Cancel this exchange: its deadline has passed."""
        if self.has_lost_client:
            self._cancel(ClientLeftError())
        elif self._waiting_for_client:
            self._cancel(RequestTimeoutError("The request body stopped coming."))
        else:
            self._cancel(UpstreamTimeoutError("The upstream was silent for too long."))

    def _cancel(self, reason: GatewayError | ClientLeftError) -> None:
        if self._cancelled_for is None and not self._ended:
            self._cancelled_for = reason
            if self._task is not None:
                self._task.cancel()
            elif not self._has_arrived:  # else it is answered in this turn
                self._start()
