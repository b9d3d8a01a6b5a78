"""One WebSocket connection to the upstream. Frames are websockets' business; handshake and flow control are ours.

websockets' own client writes target and header fields anew, counts what waits in frames (16 MiB each, perhaps),
and takes a peer that is held up for a dead one.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN, Protocol, Side

from gateway.connect import open_socket
from gateway.errors import BadRequestError, UpstreamConnectionError, UpstreamProtocolError, UpstreamTimeoutError
from gateway.frames import MESSAGE_OVERHEAD_BYTES, NO_CODE, WAITING_BYTES, Assembler, Keepalive
from gateway.handshake import Fields, HandshakeAnswer, agreed_subprotocol
from gateway.outgoing import request_head
from gateway.tls import ReadBuffer, attach

# A connection that has said goodbye has this long to close.
CLOSE_PATIENCE_S = 10.0
CUT_PATIENCE_S = 0.5


@dataclass(frozen=True, slots=True)
class Dialer:
    """Opens WebSocket connections to one host, through an egress proxy where one is given.

    `first_byte_timeout_s` bounds the wait for the handshake's answer, `silence_timeout_s` the time in which
    the upstream takes no byte of what waits for it.
    """

    host: str
    port: int
    ssl_context: ssl.SSLContext | None
    proxy_url: str | None
    connect_timeout_s: float
    first_byte_timeout_s: float
    silence_timeout_s: float
    ping_interval_s: float
    max_message_bytes: int
    buffer: ReadBuffer = field(default_factory=ReadBuffer)

    async def connect(self, target: bytes, fields: Fields) -> UpstreamSocket:
        """Return an open connection. `fields` are the client's end-to-end ones, `Host` and offered subprotocols too.

        InvalidStatus, with the whole answer, when the upstream refuses; UpstreamConnectionError,
        UpstreamTimeoutError or UpstreamProtocolError when it does not answer, or not as it must; BadRequestError
        where target or fields could not be read as they are.
        """
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        upgrade = [
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-key", key.encode()),
        ]
        try:
            head, _ = request_head("GET", target, fields + upgrade)
        except httpx.LocalProtocolError as exc:
            raise BadRequestError("The handshake cannot be passed on as it is.") from exc
        connection = UpstreamSocket(self)
        try:
            try:
                async with asyncio.timeout(self.connect_timeout_s):
                    await self._open(connection)
            except TimeoutError as exc:
                raise UpstreamTimeoutError("The upstream could not be connected to in time.") from exc
            connection.write(head)
            try:
                async with asyncio.timeout(self.first_byte_timeout_s):
                    response = await connection.answered
            except TimeoutError as exc:
                raise UpstreamTimeoutError("The upstream did not answer in time.") from exc
            if response.status_code != 101:
                raise InvalidStatus(response)
            connection.subprotocol = agreed_subprotocol(response, key=key, fields=fields)
        except BaseException:
            connection.abort()
            raise
        connection.keepalive.start()
        return connection

    async def _open(self, connection: UpstreamSocket) -> None:
        try:
            sock = await open_socket(self.host, self.port, proxy_url=self.proxy_url)
            await attach(connection, sock, buffer=self.buffer, context=self.ssl_context, server_hostname=self.host)
        except (httpx.TransportError, OSError, ValueError) as exc:
            raise UpstreamConnectionError("The connection to the upstream failed.") from exc


class UpstreamSocket(asyncio.BufferedProtocol):
    """An open connection, with the part of websockets' ClientConnection that a relay uses."""

    def __init__(self, dialer: Dialer) -> None:
        self.answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.subprotocol: str | None = None
        self.keepalive = Keepalive(
            dialer.ping_interval_s,
            ping=self._ping,
            give_up=self._give_up,
            is_held_up=lambda: self._reading_paused or self._writing_paused,
        )
        self._loop = asyncio.get_running_loop()
        self._dialer = dialer
        self._handshake: HandshakeAnswer | None = HandshakeAnswer()
        self._frames = Protocol(Side.CLIENT, max_size=dialer.max_message_bytes)
        self._assembler = Assembler()
        self._messages: deque[str | bytes] = deque()
        self._waiting_bytes = 0
        self._receiver: asyncio.Future[None] | None = None
        self._ended = False
        self._failure: Close | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._reading_paused = False
        self._writing_paused = False
        self._drained = asyncio.Event()
        self._owed_pong = b""
        self._transport: Any = None

    @property
    def response(self) -> Response:
        return self.answered.result()

    async def recv(self) -> str | bytes:
        """Return the next message; one receiver at a time. ConnectionClosed after the last one."""
        while not self._messages:
            if self._ended:
                raise self._loss()
            self._receiver = self._loop.create_future()
            await self._receiver
        message = self._messages.popleft()
        if not self._messages:
            self._waiting_bytes = 0
            self._resume_reading()
        return message

    async def send(self, message: str | bytes) -> None:
        """Send one message, and wait while the upstream is slow to take it. ConnectionClosed when it is gone."""
        if self._ended:
            raise self._loss()
        if isinstance(message, str):
            self._frames.send_text(message.encode())
        else:
            self._frames.send_binary(message)
        self._write_frames()
        if self._writing_paused:
            await self._drain()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, 1005 meaning without a code, and return; the upstream then has its time to close."""
        if self._frames.state is OPEN:
            self._frames.send_close(None if code == NO_CODE else code, reason)
            self._write_frames()
            self._end()

    def abort_soon(self) -> None:
        """Shorten that time: nothing that is still under way matters to anybody."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = self._loop.call_later(CUT_PATIENCE_S, self._transport.abort)

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._ended = True
        self.answered.cancel()

    # Messages

    def _frames_received(self, data: bytes) -> None:
        self._frames.receive_data(data)
        for frame in self._frames.events_received():
            if not self._ended and isinstance(frame, Frame) and frame.opcode <= Opcode.BINARY:
                self._take(frame)
        if self._writing_paused and self._frames.state is OPEN:
            # Pongs, and only the latest need be sent (RFC 6455 §5.5.3): who pings but does not read gets one.
            self._owed_pong = (self._frames.data_to_send() or [self._owed_pong])[-1]
            return
        self._write_frames()
        if self._frames.state is not OPEN:
            self._end()

    def _take(self, frame: Frame) -> None:
        try:
            message = self._assembler.feed(frame)
        except UnicodeDecodeError as exc:
            # Remembered, because a proper close may stand right behind it.
            self._failure = Close(1007, f"{exc.reason} at position {exc.start}")
            self._frames.fail(self._failure.code, self._failure.reason)
            self._end()
            return
        if message is None:
            return
        self._messages.append(message)
        self._waiting_bytes += len(message) + MESSAGE_OVERHEAD_BYTES
        if self._waiting_bytes > WAITING_BYTES and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake_receiver()

    def _end(self) -> None:
        """Nothing more is passed either way; what has arrived can still be received."""
        if not self._ended:
            self._ended = True
            self._patience = self._loop.call_later(CLOSE_PATIENCE_S, self._transport.abort)
        self.keepalive.stop()
        self._resume_reading()
        self._drained.set()
        self._wake_receiver()

    def _loss(self) -> ConnectionClosed:
        if self._failure is not None:
            return ConnectionClosedError(None, self._failure)
        frames = self._frames
        return ConnectionClosedError(frames.close_rcvd, frames.close_sent, frames.close_rcvd_then_sent)

    def _wake_receiver(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None and not receiver.done():
            receiver.set_result(None)

    # Keepalive

    def _ping(self) -> None:
        self._frames.send_ping(secrets.token_bytes(4))
        self._write_frames()

    def _give_up(self) -> None:
        self._frames.fail(1011, "keepalive ping timeout")
        self._write_frames()
        self._end()
        self._transport.abort()

    # Flow control

    def _write_frames(self) -> None:
        if self._transport.is_closing():
            return
        for data in self._frames.data_to_send():
            if data:
                self._transport.write(data)

    def _resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self.keepalive.heard = True
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._drained.clear()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self.keepalive.heard = True
        self._drained.set()
        if self._owed_pong:
            pong, self._owed_pong = self._owed_pong, b""
            self.write(pong)

    async def _drain(self) -> None:
        timeout_s = self._dialer.silence_timeout_s
        while not self._drained.is_set():
            waiting_bytes = self._unsent_bytes()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                if self._unsent_bytes() >= waiting_bytes:
                    self._end()
                    self._transport.abort()

    def _unsent_bytes(self) -> int:
        return int(self._transport.get_write_buffer_size())

    # From the event loop

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._dialer.buffer.plain

    def buffer_updated(self, nbytes: int) -> None:
        self.keepalive.heard = True
        data = bytes(self._dialer.buffer.plain[:nbytes])
        if self._handshake is not None:
            data = self._handshake_received(self._handshake, data)
        if data:
            self._frames_received(data)

    def _handshake_received(self, handshake: HandshakeAnswer, data: bytes) -> bytes:
        """Return what follows the answer: an upstream may speak at once."""
        try:
            rest = handshake.feed(data)
        except UpstreamProtocolError as error:
            self._fail_handshake(error)
            return b""
        if handshake.complete:
            self._handshake = None
            if not self.answered.done():
                self.answered.set_result(handshake.response())
        return rest

    def _fail_handshake(self, error: Exception) -> None:
        self._handshake = None
        if not self.answered.done():
            self.answered.set_exception(error)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        handshake = self._handshake
        if handshake is not None:
            if exc is None and handshake.ends_with_connection and not self.answered.done():
                self.answered.set_result(handshake.response())
            elif not self.answered.done():
                self.answered.set_exception(UpstreamConnectionError("The upstream closed before it had answered."))
                self.answered.exception()  # perhaps nobody waits any more
        self._frames.receive_eof()
        self._end()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
