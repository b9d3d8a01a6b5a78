"""The practice upstream behind a WebSocket, with the part of websockets' ClientConnection that a relay uses."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qs

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.frames import Close
from websockets.http11 import Response

from gateway.sandbox.fields import LONGEST_NAME, SandboxError, missing
from gateway.sandbox.realtime_session import RealtimeSession
from gateway.sandbox.responses_session import ResponsesSession
from gateway.sandbox.router import Sandbox
from gateway.sandbox.transport import Pace
from gateway.sandbox.trouble import Manner, manner_of, refusal_by
from gateway.sandbox.wire import Json, encode, error_answer, error_object, head_of

# A client that sends and does not read is held up here, as a socket's buffers would.
_MOST_WAITING = 512
_REQUEST_ID = "req_sandboxwebsocket"


class Session(Protocol):
    """What talks over a connection: events at the start, and events for every message."""

    def greeting(self) -> list[Json]: ...

    def answer(self, message: str | bytes) -> tuple[list[Json], Manner]: ...


class SandboxRealtime:
    """One open connection. Messages are JSON text; closing raises websockets' ConnectionClosed, as it does there."""

    def __init__(self, session: Session, *, subprotocol: str | None, pace: Pace) -> None:
        self._session = session
        self._pace = pace
        self._waiting: deque[tuple[str, float]] = deque()
        self._changed = asyncio.Condition()
        self._closed: ConnectionClosed | None = None
        self._drops_after_waiting = False
        self._receiving = False
        self.subprotocol = subprotocol
        self.response = Response(101, "Switching Protocols", Headers(_handshake_headers(subprotocol)))
        self.close_code: int | None = None
        self.close_reason: str | None = None
        self._queue(session.greeting(), Manner.PLAIN)

    async def send(self, message: str | bytes) -> None:
        """Hand in one message; waits while 512 events wait to be received. ConnectionClosed when it is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) < _MOST_WAITING or self._closed is not None)
            if self._closed is not None:
                raise self._closed
            events, manner = self._session.answer(message)
            self._queue(events, manner)
            self._changed.notify_all()

    async def recv(self, decode: bool | None = None) -> str | bytes:
        """Return the next event as text, or as bytes when `decode` is False; cancelling loses none.

        ConnectionClosedOK after a close, ConnectionClosedError after a drop; one receiver at a time.
        """
        if self._receiving:
            raise RuntimeError("recv() is already waiting")
        self._receiving = True
        try:
            text = await self._next()
        finally:
            self._receiving = False
        return text.encode() if decode is False else text

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close; what was not received yet is gone. A second close changes nothing."""
        async with self._changed:
            close = Close(code, reason)
            kind = ConnectionClosedOK if code in (1000, 1001) else ConnectionClosedError
            self._end(kind(close, close, False), code, reason)
            self._changed.notify_all()

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while True:
            try:
                message = await self.recv()
            except ConnectionClosedOK:
                return
            yield message

    async def _next(self) -> str:
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self._closed is not None or self._drops_after_waiting)
        if self._waiting and self._waiting[0][1]:
            # The event stays in its place during the pause, so that a cancelled receiver finds it again.
            await asyncio.sleep(self._waiting[0][1])
        async with self._changed:
            if not self._waiting and self._drops_after_waiting:
                self._end(ConnectionClosedError(None, None), 1006, "")
            if self._closed is not None:
                raise self._closed
            text, _ = self._waiting.popleft()
            self._changed.notify_all()
            return text

    def _queue(self, events: list[Json], manner: Manner) -> None:
        if manner is Manner.HANG or self._drops_after_waiting:
            return
        if manner is Manner.CUT:
            events = events[: len(events) // 2]
            self._drops_after_waiting = True
        pause_s = self._pace.between(len(events), manner)
        first_s = self._pace.slow_first_s if manner is Manner.SLOW else 0.0
        for number, text in enumerate(_encoded(events)):
            self._waiting.append((text, pause_s if number else first_s))

    def _end(self, closed: ConnectionClosed, code: int, reason: str) -> None:
        if self._closed is None:
            self._closed = closed
            self.close_code = code
            self.close_reason = reason
            self._waiting.clear()


def _encoded(events: list[Json]) -> list[str]:
    try:
        return [encode(event).decode() for event in events]
    except RecursionError:
        error = SandboxError(400, "The message's JSON is too deeply nested.", code="invalid_json")
        return [encode({"type": "error", "event_id": "event_nested", "error": error_object(error)}).decode()]


async def connect_realtime(
    target: bytes, subprotocols: list[str], *, sandbox: Sandbox | None = None, pace: Pace | None = None
) -> SandboxRealtime:
    """Return an open connection for /v1/realtime or /v1/responses; `target` is path?query.

    With the `sandbox` of a SandboxTransport, responses made here can be retrieved there. InvalidStatus, with
    the answer's status, headers and body, when the handshake is refused. A realtime `sandbox-hang` never returns.
    """
    pace = pace or Pace()
    path, _, query = target.partition(b"?")
    try:
        session, manner = _session_for(path, query, sandbox or Sandbox())
    except SandboxError as error:
        raise InvalidStatus(_refusal(error)) from error
    if manner is Manner.HANG:
        await asyncio.Event().wait()
    if manner is Manner.SLOW:
        await asyncio.sleep(pace.slow_first_s)
    # Never the offer that carries a key in browsers, openai-insecure-api-key.…
    return SandboxRealtime(session, subprotocol="realtime" if "realtime" in subprotocols else None, pace=pace)


def _session_for(path: bytes, query: bytes, sandbox: Sandbox) -> tuple[Session, Manner]:
    if path == b"/v1/responses":
        return ResponsesSession(sandbox.stock), Manner.PLAIN
    if path != b"/v1/realtime":
        shown = path.decode("ascii", errors="replace")[:200]
        message = f"The sandbox plays no WebSocket at {shown}, only at /v1/realtime and /v1/responses."
        raise SandboxError(404, message, code="unknown_url")
    model = parse_qs(query.decode("ascii", errors="replace")).get("model", [""])[0][:LONGEST_NAME]
    if not model:
        raise missing("model")
    if refusal := refusal_by(model):
        raise refusal
    return RealtimeSession(model), manner_of(model)


def _refusal(error: SandboxError) -> Response:
    answer = error_answer(error)
    headers = Headers((name.decode(), value.decode()) for name, value in head_of(answer, request_id=_REQUEST_ID))
    return Response(error.status, HTTPStatus(error.status).phrase, headers, answer.body)


def _handshake_headers(subprotocol: str | None) -> list[tuple[str, str]]:
    headers = [
        ("upgrade", "websocket"),
        ("connection", "Upgrade"),
        ("openai-organization", "sandbox"),
        ("x-request-id", _REQUEST_ID),
    ]
    return [*headers, ("sec-websocket-protocol", subprotocol)] if subprotocol else headers
