"""The server's side of a WebSocket: uvicorn's protocol, without what a proxy cannot have.

uvicorn logs paths with their query strings, resets connections on which the client is still sending, answers
every ping however full its buffer, takes a client that is held up for a dead one, refuses a handshake in plain
text, and is silent where one breaks websockets' limits.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from email.utils import formatdate
from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets import http11
from websockets.exceptions import HeaderLineTooLong, InvalidHandshake, RequestLineTooLong, TooManyHeaders
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import OPEN

from gateway.errors import (
    BadRequestError,
    GatewayError,
    HeadersTooLargeError,
    ShuttingDownError,
    error_body,
    error_headers,
)
from gateway.frames import MESSAGE_OVERHEAD_BYTES, NO_CODE, WAITING_BYTES, Assembler, Keepalive
from gateway.headers import CORS_HEADERS, RawHeaders
from proxysite import settings
from proxysite.departures import departures
from proxysite.http_exchange import checked_head, status_line

logger = logging.getLogger("proxysite.websocket")
# For what is inherited: it logs query strings at INFO, header fields and messages at DEBUG.
_silence = logging.getLogger("proxysite.websocket.inherited")
_silence.setLevel(logging.CRITICAL + 1)

_LINGER_SECONDS = 5.0
# For the application to pass on what a client that has left had said last.
_LAST_WORDS_SECONDS = 0.25
# In a process that was told to stop; then there is time left to say goodbye.
_STAY_SECONDS = max(0, settings.GRACEFUL_TIMEOUT_SECONDS - 1)
# What is read at once may hold tens of thousands of frames; the first piece of it holds at most a hundred.
_PIECE_BYTES = 512
_LONG_PIECE_BYTES = 64 * 1024
_FRAMES_IN_A_TURN = 256
_MESSAGES_IN_A_TURN = 64
# A head comes here within the bounds of `http_protocol`: what is allowed there shall not be too much here.
http11.MAX_LINE_LENGTH = max(http11.MAX_LINE_LENGTH, settings.MAX_HEADER_BYTES)
http11.MAX_NUM_HEADERS = max(http11.MAX_NUM_HEADERS, 256)
_TOO_LARGE = (RequestLineTooLong, HeaderLineTooLong, TooManyHeaders)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One client's WebSocket. `scope["target"]` is path and query as they stood on the wire.

    A `websocket.disconnect` has a `reason` where the client has sent a close frame, and only there. A
    `websocket.close` with the code 1005 sends a close frame without a code.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = self.conn.logger = _silence
        self.conn.debug = False
        self.default_headers = []  # the upstream's answer has a Date of its own
        self._keepalive = Keepalive(
            settings.WEBSOCKET_PING_SECONDS,
            ping=self._ping,
            give_up=lambda: self._part(1011, "keepalive ping timeout"),
            is_held_up=lambda: self.read_paused or not self.writable.is_set(),
        )
        self._assembler = Assembler()
        self._waiting_bytes = 0
        self._owed_pong = b""
        self._parted = False
        self._unparsed = b""
        self._unparsed_from = 0
        self._frames_taken = 0
        self._messages_given = 0
        self._task: asyncio.Task[None] | None = None
        self._descriptor = -1  # by which departures knows this connection, once it has been paused
        self._has_left = False
        self._refusal: Any = None  # the ASGI message that begins an answer which is no 101

    # The application

    async def run_asgi(self) -> None:
        self._task = asyncio.current_task()
        self.scope["target"] = self.request.path.encode("ascii")  # type: ignore[typeddict-unknown-key]
        try:
            await self.app(self.scope, self.receive, self.send)
        except (ClientDisconnected, asyncio.CancelledError):
            pass
        except Exception:
            logger.exception("the application failed")
            if self.handshake_complete:
                self._part(1011)
            else:
                self._refuse(GatewayError("Internal server error."))
        self._task = None  # it leads back here
        if self.close_timer is not None:
            self.loop.call_later(self.close_timeout + _LINGER_SECONDS, self.transport.abort)
        elif not self._parted:
            self.transport.close()

    async def receive(self) -> Any:
        self._messages_given += 1
        if self._messages_given % _MESSAGES_IN_A_TURN == 0:
            await asyncio.sleep(0)
        message = await self.queue.get()
        if self.queue.empty():
            self._waiting_bytes = 0
            if self.read_paused:
                self._resume_reading()
        return message

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        if self.close_sent or self.transport.is_closing():
            raise ClientDisconnected
        kind = message["type"]
        if kind in ("websocket.send", "websocket.accept", "websocket.close"):
            if kind == "websocket.close" and message["code"] == NO_CODE:
                message = {**message, "code": None}
            await super().send(message)
        elif kind == "websocket.http.response.start":
            self._refusal = message
        else:
            # uvicorn would add what an upstream has not sent: a type, and a length where there can be no body.
            self._answer(self._refusal["status"], self._refusal["headers"], message["body"])

    # From the client

    def data_received(self, data: bytes) -> None:
        if self._parted:
            return
        self._keepalive.heard = True
        if self._unparsed:
            self._unparsed = self._unparsed[self._unparsed_from :] + data
            self._unparsed_from = 0
        elif len(data) <= _PIECE_BYTES:
            self._parse(data)
        else:
            self._unparsed, self._unparsed_from = data, 0
            self.transport.pause_reading()
            _turns.ask_for(self)

    def take_turn(self) -> bool:
        """Go on with what has been read, for a while; return whether another turn is needed.

        What the application is too slow for waits until it has received the rest.
        """
        frames_before = self._frames_taken
        piece_bytes = _PIECE_BYTES
        self._keepalive.heard = True
        while self._unparsed_from < len(self._unparsed):
            if self.read_paused:
                return False
            if self._frames_taken - frames_before >= _FRAMES_IN_A_TURN:
                return True
            frames, start = self._frames_taken, self._unparsed_from
            self._unparsed_from += piece_bytes
            self._parse(self._unparsed[start : self._unparsed_from])
            # Inside a long message there is nothing to be careful about.
            piece_bytes = _PIECE_BYTES if self._frames_taken > frames else min(4 * piece_bytes, _LONG_PIECE_BYTES)
        self._unparsed = b""
        if not (self.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()
        return False

    def _parse(self, data: bytes) -> None:
        if self._parted:
            return
        self.conn.receive_data(data)
        self.handle_events()
        if self.conn.parser_exc is not None:
            self._part()
        elif self.conn.handshake_exc is not None and not self.handshake_initiated:
            self._refuse(_refusal_of(self.conn.handshake_exc))

    def handle_connect(self, event: Request) -> None:
        try:
            self.conn.process_request(event)  # uvicorn's own refusal is no error of OpenAI's form
        except InvalidHandshake as exc:
            self._refuse(_refusal_of(exc))
            return
        super().handle_connect(event)

    def handle_text(self, event: Frame) -> None:
        self._take(event)

    def handle_bytes(self, event: Frame) -> None:
        self._take(event)

    def handle_cont(self, event: Frame) -> None:
        self._take(event)

    def _take(self, frame: Frame) -> None:
        self._frames_taken += 1
        if self.close_sent:
            return
        try:
            message = self._assembler.feed(frame)
        except UnicodeDecodeError as exc:
            self._part(1007, f"{exc.reason} at position {exc.start}")
            return
        if message is None:
            return
        if isinstance(message, str):
            self.queue.put_nowait({"type": "websocket.receive", "text": message})
        else:
            self.queue.put_nowait({"type": "websocket.receive", "bytes": message})
        self._waiting_bytes += len(message) + MESSAGE_OVERHEAD_BYTES
        if self._waiting_bytes > WAITING_BYTES and not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
            if self._descriptor < 0:
                self._descriptor = departures.watch(self.transport, self._client_left)
            elif self._has_left:
                self._client_left()

    def handle_ping(self) -> None:
        self._frames_taken += 1
        pongs = self.conn.data_to_send()
        if not pongs:
            return
        if self.writable.is_set() or self.conn.state is not OPEN:
            self.transport.write(b"".join(pongs))
        else:
            # Only the latest need be sent (RFC 6455 §5.5.3): who pings but does not read gets one.
            self._owed_pong = pongs[-1]

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keepalive.heard = True
        pong, self._owed_pong = self._owed_pong, b""
        if pong and not self._parted:  # behind which nothing is written
            self.transport.write(pong)

    def _resume_reading(self) -> None:
        self.read_paused = False
        self._keepalive.heard = True
        if self._unparsed:
            _turns.ask_for(self)
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    # Keepalive

    def start_keepalive(self) -> None:
        self._keepalive.start()

    def stop_keepalive(self) -> None:
        self._keepalive.stop()

    def handle_pong(self, event: Frame) -> None:
        self._frames_taken += 1  # heard, as any byte

    def _ping(self) -> None:
        if self.conn.state is OPEN and not self.transport.is_closing():
            self.conn.send_ping(secrets.token_bytes(4))
            self.transport.write(b"".join(self.conn.data_to_send()))

    # Ends

    def connection_lost(self, exc: Exception | None) -> None:
        # Only a reset comes before what was read is parsed: an orderly end waits unread behind it.
        self._unparsed = b""
        super().connection_lost(exc)
        if self._descriptor >= 0:
            departures.forget(self._descriptor, self._client_left)
        if self.queue.qsize() > 1 and self.conn.close_rcvd is None:
            # Behind messages that nobody may ever take, the application would learn of it too late.
            self.loop.call_later(_LAST_WORDS_SECONDS, self._end_session)

    def eof_received(self) -> None:
        # As of HTTP; behind a goodbye what waits is still to be read.
        if self.conn.state is OPEN and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _client_left(self) -> None:
        # Where it is read from, its end will be read, behind what it has sent.
        self._has_left = True
        if self.read_paused:
            self.loop.call_later(_LAST_WORDS_SECONDS, self._end_session)

    def _end_session(self) -> None:
        """End what goes on for a client that has left, unless the application has come to know of it."""
        if self.read_paused and not self.transport.is_closing():
            self.transport.abort()
        if self.transport.is_closing() and self._task is not None and not self.queue.empty():
            self._task.cancel()

    def shutdown(self) -> None:
        """Go on: a session, as a stream, outlives a reload by as long as it likes."""

    def stop(self) -> None:
        """Let a running session end by itself for as long as a stream may."""
        if not self.handshake_complete:
            self._refuse(ShuttingDownError("The gateway is restarting; try again.", retry_after_s=1))
        elif not self.close_sent:
            self.loop.call_later(_STAY_SECONDS, self._part, 1012)

    def _part(self, code: int = 0, reason: str = "") -> None:
        """Close from this side, and tell the application; a code of 0 means that websockets has chosen one.

        Reading goes on, into nothing, until the client has closed: a close on unread bytes is a reset, and
        would take the close frame with it.
        """
        if self._parted:
            return
        self._parted = True
        self._keepalive.stop()
        if code and self.conn.state is OPEN:
            self.conn.send_close(code, reason)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
        if not self.transport.is_closing():
            self.transport.write(b"".join(self.conn.data_to_send()))
            if self.transport.can_write_eof():
                self.transport.write_eof()
        self.close_sent = True
        if self.read_paused:
            self._resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _refuse(self, error: GatewayError) -> None:
        """Answer the handshake with an error of the server's own."""
        if self.close_sent or self.transport.is_closing():
            return
        body = error_body(error)
        self._answer(error.status, error_headers(error, request_id="", body_bytes=len(body)) + CORS_HEADERS, body)

    def _answer(self, status: int, headers: RawHeaders, body: bytes) -> None:
        """Answer the handshake, otherwise than with a WebSocket. Raises RuntimeError for a field with a line break."""
        fields = [field for field in headers if field[0].lower() != b"content-length"]
        if status not in (204, 304):  # RFC 9110 §8.6, §15.4.5
            fields.append((b"content-length", b"%d" % len(body)))
        if all(name.lower() != b"date" for name, _ in fields):
            fields.append((b"date", formatdate(usegmt=True).encode("ascii")))
        fields.append((b"connection", b"close"))
        head = checked_head([status_line(status, None), *(b"%b: %b" % field for field in fields)])
        self.handshake_complete = self.close_sent = True
        self.transport.write(head + body)
        self.transport.close()


class _Turns:
    """Lets one connection after the other go on with what it has read: one in each turn of the event loop.

    However many flood this worker, others wait for one turn of one of them.
    """

    def __init__(self) -> None:
        self._waiting: deque[WebSocketProtocol] = deque()

    def ask_for(self, connection: WebSocketProtocol) -> None:
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            connection.loop.call_soon(self._next)

    def _next(self) -> None:
        connection = self._waiting[0]
        needs_more = False
        try:
            needs_more = connection.take_turn()
        finally:
            self._waiting.popleft()
            if needs_more:
                self._waiting.append(connection)
            if self._waiting:
                connection.loop.call_soon(self._next)


_turns = _Turns()


def _refusal_of(exc: Exception) -> GatewayError:
    if isinstance(exc, _TOO_LARGE) or isinstance(exc.__cause__, _TOO_LARGE):
        return HeadersTooLargeError("The handshake's request line or a header field is too long.")
    error = BadRequestError("This is not a valid WebSocket handshake.")
    error.headers.append((b"sec-websocket-version", b"13"))  # RFC 6455 §4.4
    return error
