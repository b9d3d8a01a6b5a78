"""One WebSocket in, one out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import parse_qs

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response

from billing.events import Outcome
from gateway import headers as wire
from gateway.asgi import Message, Receive, Scope, Send
from gateway.errors import (
    BadRequestError,
    GatewayError,
    KeyBlockedError,
    OverloadedError,
    UnknownUrlError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
    error_body,
    error_headers,
    error_message,
)
from gateway.paths import is_gateway_path
from gateway.relay import Relay
from gateway.session_guard import RESPONSES_ROUTE, SessionGuard
from gateway.session_meter import SessionMeter
from gateway.websocket import Dialer, UpstreamSocket

logger = logging.getLogger("gateway.realtime")

_GOING_AWAY = 1001
_POLICY_VIOLATION = 1008
_INTERNAL_ERROR = 1011
# A client that does not read is not waited for to be told that it may not go on.
_GOODBYE_SECONDS = 1.0
_QUERY_MAX_BYTES = 4096


class Peer(Protocol):
    """The other end: `gateway.websocket.UpstreamSocket`, or the sandbox's likeness of it."""

    subprotocol: str | None

    @property
    def response(self) -> Response: ...
    async def send(self, message: str | bytes) -> None: ...
    async def recv(self) -> str | bytes: ...
    async def close(self, code: int = ..., reason: str = ...) -> None: ...


Sandbox = Callable[[bytes, list[str]], Awaitable[Peer]]


class Realtime:
    """An ASGI application that joins each client's WebSocket to one of its own at the relay's upstream.

    `sandbox`, where given, is called with target and offered subprotocols for the clients that carry
    `sandbox_key`.
    """

    def __init__(
        self,
        relay: Relay,
        *,
        ssl_context: ssl.SSLContext,
        proxy_url: str | None = None,
        max_message_bytes: int = 16 << 20,
        ping_interval_s: float = 20.0,
        sandbox: Sandbox | None = None,
        sandbox_key: str = "",
    ) -> None:
        url, limits = relay.url, relay.limits
        is_secure = url.scheme == "https"
        self.relay = relay
        self._sandbox = sandbox
        self._sandbox_key = sandbox_key.encode()
        self._dialer = Dialer(
            host=url.host,
            port=url.port or (443 if is_secure else 80),
            ssl_context=ssl_context if is_secure else None,
            proxy_url=proxy_url,
            connect_timeout_s=limits.connect_timeout_s,
            first_byte_timeout_s=limits.first_byte_timeout_s,
            silence_timeout_s=limits.silence_timeout_s,
            ping_interval_s=ping_interval_s,
            max_message_bytes=max_message_bytes,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay = self.relay
        await receive()  # websocket.connect
        try:
            _check_target(scope)
        except GatewayError as error:
            relay.metering.tally.failed(error.code)
            await deny(send, error, request_id=relay.metering.new_event_id())
            return
        meter = SessionMeter(relay.metering, scope, model=_model_asked_for(scope))
        is_full = relay.open_streams >= relay.limits.max_open_streams
        relay.open_sockets += 1  # before anything is waited for, while others come
        try:
            if await self._is_admitted(scope, send, meter, is_full=is_full):
                await _Conversation(self, scope, receive, send, meter).run()
        finally:
            relay.open_sockets -= 1

    async def _is_admitted(self, scope: Scope, send: Send, meter: SessionMeter, *, is_full: bool) -> bool:
        """Return whether a client may come in; if not, it has been told."""
        relay = self.relay
        try:
            meter.check_not_blocked()
            if is_full:
                raise OverloadedError("Too many open streams; try again soon.", retry_after_s=1)
            if relay.limiter is not None:
                relay.limiter.screen(meter, scope)
                is_told_later = meter.endpoint.route == RESPONSES_ROUTE
                await relay.limiter.admit_session(meter, scope, model=_only_model(scope), is_told_later=is_told_later)
        except GatewayError as error:
            meter.status = error.status
            meter.end("refused")
            relay.metering.tally.failed(error.code)
            await deny(send, error, request_id=meter.request_id)
            return False
        except asyncio.CancelledError:  # the server stops
            meter.end("refused")
            raise
        return True

    async def connect(self, scope: Scope) -> Peer:
        """Return an open connection to the upstream, or to the sandbox.

        GatewayError when there is none; InvalidStatus, with the whole answer, when the upstream refuses.
        """
        relay, headers = self.relay, scope["headers"]
        if self._sandbox is not None and wire.api_key_of(headers) == self._sandbox_key:
            try:
                async with asyncio.timeout(relay.limits.first_byte_timeout_s):
                    return await self._sandbox(scope["target"], scope["subprotocols"])
            except TimeoutError as exc:
                raise UpstreamTimeoutError("The upstream did not answer in time.") from exc
        allowed = wire.to_upstream(headers, host=relay.host).headers
        fields = [field for field in allowed if field[0] != b"content-length"]
        fields += [field for field in headers if field[0] == b"sec-websocket-protocol"]
        return await self._dialer.connect(relay.base_path + scope["target"], fields)


class _Conversation:
    """One client and its upstream; `run` returns when both are gone, or the client has been refused."""

    def __init__(self, realtime: Realtime, scope: Scope, receive: Receive, send: Send, meter: SessionMeter) -> None:
        self._meter = meter
        self._outcome: Outcome = "client_closed"
        self._realtime = realtime
        self._scope = scope
        self._receive = receive
        self._send = send
        self._peer: Peer | None = None
        self._joined = asyncio.Event()
        self._farewell: tuple[int, str] | None = None
        self._refusal: GatewayError | None = None
        self._guard: SessionGuard | None = None

    async def run(self) -> None:
        down = asyncio.create_task(self._pass_down())
        up = asyncio.create_task(self._pass_up())
        try:
            await asyncio.wait((down, up), return_when=asyncio.FIRST_COMPLETED)
        finally:
            down.cancel()
            up.cancel()
            try:
                await asyncio.wait((down, up))
            finally:  # also where the server will not wait: the session is told of
                # Tokens that have to be counted do not keep the upstream waiting for its end.
                parting = asyncio.create_task(self._part())
                try:
                    await self._meter.finish(self._outcome)
                finally:
                    await parting
        for task in (down, up):
            if not task.cancelled():
                task.result()

    async def _part(self) -> None:
        if self._refusal is not None:
            await self._turn_out(self._refusal)
        if self._peer is not None:
            await self._leave(self._peer)

    async def _leave(self, peer: Peer) -> None:
        """Close the upstream as the client closed; an upstream that has closed by itself only lets go."""
        code, reason = self._farewell or (_GOING_AWAY, "")
        await peer.close(code, reason)
        if self._farewell is None and isinstance(peer, UpstreamSocket):
            peer.abort_soon()

    # Upstream to client

    async def _pass_down(self) -> None:
        try:
            peer = await self._join()
            if peer is not None:
                await self._pass_messages_down(peer)
        except OSError:
            return  # the client has left: `_pass_up` is told so too

    async def _join(self) -> Peer | None:
        """Open the upstream first: only it can say whether the client is accepted."""
        try:
            peer = self._peer = await self._realtime.connect(self._scope)
        except InvalidStatus as exc:
            self._outcome, self._meter.status = "completed", exc.response.status_code
            self._note_request_id(exc.response)
            await self._refuse(exc.response)
            return None
        except GatewayError as error:
            self._outcome = "timeout" if isinstance(error, UpstreamTimeoutError) else "upstream_error"
            if isinstance(error, BadRequestError):
                self._outcome = "refused"
            self._meter.status = error.status
            logger.warning("upstream failed: %s: %s", type(error).__name__, error.__cause__ or error.message)
            self._realtime.relay.metering.tally.failed(error.code)
            await deny(self._send, error, request_id=self._meter.request_id)
            return None
        self._note_request_id(peer.response)
        headers = self._headers_to_client(peer.response)
        self._meter.status = 101
        await self._send({"type": "websocket.accept", "subprotocol": peer.subprotocol, "headers": headers})
        self._joined.set()
        return peer

    async def _refuse(self, response: Response) -> None:
        if 200 <= response.status_code <= 599:
            await _answer(self._send, response.status_code, self._headers_to_client(response), bytes(response.body))
        else:
            error = UpstreamProtocolError(f"The upstream answered with status {response.status_code}.")
            self._realtime.relay.metering.tally.failed(error.code)
            await deny(self._send, error, request_id=self._meter.request_id)

    def _note_request_id(self, response: Response) -> None:
        self._meter.upstream_request_id = response.headers.get("x-request-id", "")[:100]

    def _headers_to_client(self, response: Response) -> wire.RawHeaders:
        ours = self._meter.request_id.encode()
        headers = [*_headers_to_client(response), (b"x-proxy-request-id", ours)]
        return headers if self._meter.upstream_request_id else [*headers, (b"x-request-id", ours)]

    async def _pass_messages_down(self, peer: Peer) -> None:
        recv, send, meter = peer.recv, self._send, self._meter
        try:
            while True:
                message = await recv()
                kind = meter.feed(message)
                if meter.has_used() or meter.is_untold():
                    # Before the client can hold the whole response: what it has used is then on disk.
                    meter.settle("completed")
                    if meter.is_untold():
                        await meter.estimate("completed")
                    is_over = not await self._may_go_on(kind)
                else:
                    is_over = self._guard is not None and not await self._guard.allows(kind, message)
                if is_over and meter.hold is not None:
                    await self._cut(message, meter.hold.cut_for)
                    return
                await send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})
        except ConnectionClosed as exc:
            code, reason = _farewell_to_client(exc)
            self._outcome = "upstream_error" if code == _INTERNAL_ERROR else "completed"
            await send({"type": "websocket.close", "code": code, "reason": reason})

    async def _may_go_on(self, kind: str) -> bool:
        """Return whether there are tokens and money left behind a response."""
        if self._guard is not None:
            await self._guard.allows(kind, "")
        return self._meter.hold is None or await self._meter.hold.may_go_on()

    async def _cut(self, message: str | bytes, error: GatewayError) -> None:
        """Pass on what the session's last money was spent for, say so, and end it."""
        self._outcome = "timeout"
        await self._send({"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message})
        await self._end_with(error)

    async def _turn_out(self, error: GatewayError) -> None:
        """End the session of a client that may not go on, whether it reads or not."""
        with contextlib.suppress(OSError):  # TimeoutError is one, and the server's word for a client that has left
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self._end_with(error)

    async def _end_with(self, error: GatewayError) -> None:
        self._realtime.relay.metering.tally.failed(error.code)
        await self._send({"type": "websocket.send", "text": error_message(error)})
        await self._send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": error.message})

    # Client to upstream

    async def _pass_up(self) -> None:
        """Return when the client has left, or may not go on."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self._farewell = _farewell_of_client(message)
                return
            await self._joined.wait()
            assert self._peer is not None  # noqa: S101 - set before `_joined`
            try:
                self._meter.check_not_blocked()
            except KeyBlockedError as error:
                self._refusal, self._outcome = error, "refused"
                return
            text = message.get("text")
            sent = message["bytes"] if text is None else text
            if self._realtime.relay.limiter is not None and not await self._is_within_limits(sent):
                continue
            self._meter.feed_up(sent)
            # An upstream that has closed is reported by `_pass_down`, behind what it had sent.
            with contextlib.suppress(ConnectionClosed):
                await self._peer.send(sent)

    async def _is_within_limits(self, message: str | bytes) -> bool:
        """Return whether a message may go up; if not, the client has been told, and the session goes on."""
        limiter = self._realtime.relay.limiter
        guard = self._guard
        if guard is None:
            assert limiter is not None  # noqa: S101 - asked by `_pass_up`
            guard = self._guard = SessionGuard(limiter, self._meter, model=_only_model(self._scope) or "")
        try:
            await guard.check(message)
        except GatewayError as error:
            self._realtime.relay.metering.tally.failed(error.code)
            event = error_message(error, event_id=guard.event_id or None)
            with contextlib.suppress(OSError):  # a client that has left is told of by `_receive`
                await self._send({"type": "websocket.send", "text": event})
            return False
        return True


def _model_asked_for(scope: Scope) -> str:
    asked = parse_qs(scope["query_string"][:_QUERY_MAX_BYTES].decode("latin-1")).get("model", [""])
    return str(asked[0][:100])


def _only_model(scope: Scope) -> str | None:
    """Return the model that a client asks for, None where it names none.

    "" where it may be another: limits must not be led astray.
    """
    query = scope["query_string"]
    if len(query) > _QUERY_MAX_BYTES:
        return ""
    asked = set(parse_qs(query.decode("latin-1")).get("model", []))
    if not asked:
        return None
    return str(asked.pop()[:100]) if len(asked) == 1 else ""


def _check_target(scope: Scope) -> None:
    if b"#" in scope["target"]:
        raise BadRequestError("A request target has no fragment.")
    if not is_gateway_path(scope["raw_path"]):
        raise UnknownUrlError("There is no WebSocket at this path: OpenAI's are below /v1.")


def _farewell_of_client(message: Message) -> tuple[int, str] | None:
    """Return what the client closed with; None where it, or this server, broke off.

    Only a close frame has a reason, were it an empty one.
    """
    return (message["code"], message["reason"]) if "reason" in message else None


def _farewell_to_client(exc: ConnectionClosed) -> tuple[int, str]:
    if exc.rcvd is not None:
        return exc.rcvd.code, exc.rcvd.reason
    if exc.sent is not None:
        # Not the code that the upstream was given: 1009 would blame the client's message.
        return _INTERNAL_ERROR, f"upstream: {exc.sent.reason}"[:120]
    return _INTERNAL_ERROR, "upstream: connection lost"


def _headers_to_client(response: Response) -> wire.RawHeaders:
    raw = [(name.encode("ascii"), value.encode("latin-1")) for name, value in response.headers.raw_items()]
    return [
        field
        for field in wire.to_client(raw).headers
        if field[0].lower() != b"content-length" and not field[0].lower().startswith(b"sec-websocket-")
    ]


async def deny(send: Send, error: GatewayError, *, request_id: str = "") -> None:
    """Answer the handshake with an error of the gateway's own."""
    body = error_body(error)
    headers = error_headers(error, request_id=request_id, body_bytes=len(body)) + wire.CORS_HEADERS
    await _answer(send, error.status, headers, body)


async def _answer(send: Send, status: int, headers: wire.RawHeaders, body: bytes) -> None:
    start: dict[str, Any] = {"type": "websocket.http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": body})
