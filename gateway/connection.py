"""One HTTP/1.1 connection to an upstream.

`Connection` is an `asyncio.BufferedProtocol`: the event loop reads into a buffer that all connections of a
transport share, httptools (llhttp, strict) parses it, and what belongs to the body is queued on an `Answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import socket
import ssl
import struct
import termios
from collections.abc import Callable, Coroutine
from typing import Any

import httptools
import httpx2 as httpx

from gateway.answer import Answer, Fields, Interim
from gateway.tls import ReadBuffer, TlsTransport

Origin = tuple[str, str, int]

# Bound on what is no body: interim answers and the head together, and later chunk extensions or trailers.
HEAD_BYTES = 262_144
# Looks at an upload in each time limit: silence is noticed later by one part of it at most.
_LOOKS = 8


class Connection(asyncio.BufferedProtocol):
    """Carries one exchange after another; `on_free` is called between two, `on_lost` at the end.

    `closed` is final. Whatever goes wrong ends in `fail`, which aborts the socket at once.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        buffer: ReadBuffer,
        on_free: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.origin = origin
        self.idle_since_s = 0.0
        self.closed = False
        self._on_free = on_free
        self._on_lost = on_lost
        self._buffer = buffer
        self._answer: Answer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._held_socket: socket.socket | None = None
        self._drained: asyncio.Future[None] | None = None
        self._writing_paused = False
        self._write_timer: asyncio.TimerHandle | None = None
        self._pieces: list[bytes] = []
        self._fields: Fields = []
        self._reasons: list[bytes] = []
        self._bodyless_bytes = 0
        self._message_complete = False
        self._reusable = True
        # Looked up once by the parser: a piece of a body costs no Python call, nor does one of a reason phrase.
        self.on_body = self._pieces.append
        self.on_status = self._reasons.append

    # One exchange

    def ask(
        self,
        data: bytes,
        more: bytes,
        *,
        bodyless: bool,
        read_timeout_s: float | None,
        write_timeout_s: float | None = None,
    ) -> Answer:
        """Write a request in two parts, or its head when `upload` follows; return the answer to wait for."""
        self._message_complete = False
        self._reusable = True
        self._bodyless_bytes = 0
        answer = self._answer = Answer(self, bodyless=bodyless, read_timeout_s=read_timeout_s)
        self._transport.write(data)
        if more:
            self._hold_socket()
            self._transport.write(more)
            if self._writing_paused:
                self._time_writing(write_timeout_s)
        return answer

    def upload(self, sending: Coroutine[Any, Any, None]) -> None:
        """Run what sends the rest of the request beside the wait for the answer."""
        self._hold_socket()
        self._upload = self.loop.create_task(sending)

    def upload_ended(self, error: BaseException | None = None) -> None:
        self._upload = None
        if error is not None:
            self.fail(error)

    def heard_nothing_of(self, answer: Answer) -> bool:
        """Whether not one byte of this answer, the last one asked for here, has come."""
        return not answer.status and not self._bodyless_bytes

    def fail(self, error: BaseException) -> None:
        """Abort the connection; the answer in progress raises the error, after what has arrived of it."""
        answer, self._answer = self._answer, None
        self.abort()
        if answer is not None:
            answer.end(error)
            answer.wake()

    def abort(self) -> None:
        self.closed = True
        self._transport.abort()
        self._let_go_of_socket()
        self._stop_write_timer()
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.cancel()

    @property
    def usable(self) -> bool:
        return not (self.closed or self._has_goodbye() or self._transport.is_closing())

    def _has_goodbye(self) -> bool:
        return self._tls is not None and self._tls.said_goodbye

    # An answer that comes with a reset: the upstream refuses an upload and closes at once. A write may then fail
    # before the answer is read, and the event loop closes the socket on it. The kernel still has the answer.

    def _hold_socket(self) -> None:
        """Keep the socket open past the event loop's closing of it."""
        sock = self._transport.get_extra_info("socket")
        if self._held_socket is None and sock is not None:
            with contextlib.suppress(OSError):  # no descriptor to spare: then it may be closed early
                self._held_socket = socket.socket(fileno=os.dup(sock.fileno()))

    def _let_go_of_socket(self) -> None:
        if self._held_socket is not None:
            self._held_socket.close()
            self._held_socket = None

    def _read_what_is_left(self) -> None:
        reader = self._tls or self
        with contextlib.suppress(OSError):
            while self._answer is not None and self._held_socket is not None:
                nbytes = self._held_socket.recv_into(reader.get_buffer(-1))
                if not nbytes:
                    return
                reader.buffer_updated(nbytes)

    # Flow control

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self.usable:
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._stop_write_timer()
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    async def write(self, data: bytes, *, timeout_s: float | None) -> None:
        """Write, and wait while the upstream is slow to take it; once it is lost, until the upload is ended.

        The connection fails with `httpx.WriteTimeout` when the upstream has taken nothing for `timeout_s`.
        """
        if self.usable:
            self._transport.write(data)
            if not self._writing_paused:
                return
        drained = self._drained = self.loop.create_future()
        self._time_writing(timeout_s)
        await drained

    def _time_writing(self, timeout_s: float | None, unsent_bytes: float = math.inf, since_s: float = 0.0) -> None:
        """Look now and then, until writing goes on, whether the upstream takes anything."""
        self._stop_write_timer()
        if timeout_s is None or self.closed:
            return
        now, left_bytes = self.loop.time(), self._unsent_bytes()
        if left_bytes < unsent_bytes:
            since_s = now
        elif now - since_s >= timeout_s:
            self.fail(httpx.WriteTimeout(f"the upstream took nothing for {timeout_s} s"))
            return
        pause_s = timeout_s / _LOOKS
        self._write_timer = self.loop.call_later(pause_s, self._time_writing, timeout_s, left_bytes, since_s)

    def _unsent_bytes(self) -> int:
        """Return what the upstream has yet to take, of what stands here and in the kernel."""
        waiting: int = self._transport.get_write_buffer_size()
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
            waiting += in_kernel
        return waiting

    def _stop_write_timer(self) -> None:
        timer, self._write_timer = self._write_timer, None
        if timer is not None:
            timer.cancel()

    # From the event loop

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._tls = transport if isinstance(transport, TlsTransport) else None
        self._parser = httptools.HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer.plain

    def buffer_updated(self, nbytes: int) -> None:
        answer = self._answer
        if answer is None:  # Nothing was asked: whatever this is, it must not become an answer.
            self.abort()
            return
        try:
            self._parser.feed_data(self._buffer.plain[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._reusable = False
            if not self._message_complete:
                self._deliver(answer)
                self._bodyless_bytes += nbytes
                self._refuse(exc)
                return
        pieces = self._pieces
        if len(pieces) == 1 and not answer.bodyless:
            self._bodyless_bytes = 0
            answer.add(pieces.pop())
        elif pieces:
            self._deliver(answer)
        elif not self._message_complete:
            self._bodyless_bytes += nbytes
            if self._bodyless_bytes > HEAD_BYTES:
                self.fail(httpx.RemoteProtocolError(f"more than {HEAD_BYTES} bytes of headers"))
                return
        if self._message_complete:
            self._complete(answer)
        answer.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not isinstance(exc, ssl.SSLError):  # behind a broken record nothing can be read
            self._read_what_is_left()
        answer = self._answer
        if answer is not None and (exc is None or self._has_goodbye()) and answer.ends_with_line:
            # Over TLS this holds without a close_notify too: many servers never send one.
            self._reusable = False
            self._complete(answer)
            answer.wake()
        else:
            self.fail(self._loss(answer, exc))
        self.resume_writing()
        self._on_lost(self)
        # They hold this object's bound methods: a cycle for the garbage collector.
        del self._parser, self.on_body, self.on_status

    # From the parser

    def on_message_begin(self) -> None:
        if self._message_complete:
            # Stops the parser, or this one's body would join the body of the answer that was asked for.
            raise httpx.RemoteProtocolError("more than one answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        answer = self._answer
        assert answer is not None  # noqa: S101 - buffer_updated parses nothing without one
        status = self._parser.get_status_code()
        fields, self._fields = self._fields, []
        reasons = self._reasons
        reason = reasons[0] if len(reasons) == 1 else b"".join(reasons)
        reasons.clear()
        if self._message_complete:
            return
        if status < 200:
            # 101 too: no request asked for another protocol (RFC 9110 §15.2.2). Nor has any asked for a 100, which
            # nobody is told of.
            if status < 100 or status == 101:
                raise httpx.RemoteProtocolError(f"unexpected status {status}")
            if status > 101:
                answer.add_interim(Interim(status, reason, fields))
            return
        answer.fields = fields
        answer.reason = reason
        answer.status = status
        version = self._parser.get_http_version()
        if version != "1.1":
            answer.http_version = b"HTTP/" + version.encode()
        if self._upload is not None:
            self._reusable = False
        if answer.bodyless:
            self._end_message()

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is not None and answer.status and not self._message_complete:
            self._end_message()

    # Ends

    def _end_message(self) -> None:
        self._message_complete = True
        if not self._parser.should_keep_alive():
            self._reusable = False

    def _deliver(self, answer: Answer) -> None:
        pieces = self._pieces
        self._bodyless_bytes = 0
        if answer.bodyless:
            self._reusable = False
        elif pieces:
            answer.add(b"".join(pieces))
        pieces.clear()

    def _complete(self, answer: Answer) -> None:
        """Give the connection back, before anybody asks for the rest of the answer."""
        self._answer = None
        self._let_go_of_socket()
        if self._fields:
            answer.trailers, self._fields = self._fields, []
        answer.end()
        if not self._reusable or self._upload is not None or not self.usable:
            self.abort()
            return
        if answer.bodyless:
            # The parser may wait for the body that a Content-Length announces: it cannot be told of HEAD.
            self._parser = httptools.HttpResponseParser(self)
        self._on_free(self)

    def _refuse(self, exc: Exception) -> None:
        error = exc.__context__
        if not isinstance(error, httpx.RemoteProtocolError):
            error = httpx.RemoteProtocolError(f"the upstream's answer is not HTTP: {exc}")
            error.__cause__ = exc
        self.fail(error)

    def _loss(self, answer: Answer | None, exc: Exception | None) -> httpx.TransportError:
        error: httpx.TransportError
        if exc is not None:
            error = httpx.ReadError(f"the connection to the upstream broke: {exc}")
        elif answer is None or not answer.status:
            error = httpx.RemoteProtocolError("the upstream closed the connection without an answer")
        else:
            error = httpx.RemoteProtocolError("the upstream closed the connection before the end of its answer")
        error.__cause__ = exc
        return error
