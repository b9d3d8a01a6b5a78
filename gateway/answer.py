"""The answer to one request while it arrives: its head, then its body as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, NoReturn, Protocol

import httpx2 as httpx

Fields = list[tuple[bytes, bytes]]

# Bytes waiting for a slow consumer above which the socket is no longer read.
WAITING_BYTES = 262_144


class Interim(NamedTuple):
    """An answer that another one follows (RFC 9110 §15.2): 102, 103, whatever begins with 1, but 100 and 101."""

    status: int
    reason: bytes
    fields: Fields


class Reader(Protocol):
    """Whoever is told of an answer in the turn in which it comes, instead of being woken."""

    def take_interim(self, interim: Interim) -> None:
        """Called with each interim answer, before `arrived`."""

    def arrived(self) -> None:
        """Called once, when there is a head, or none will come."""


class Line(Protocol):
    """The connection under an answer; it carries other exchanges once this one has ended."""

    loop: asyncio.AbstractEventLoop

    def fail(self, error: BaseException) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Answer(httpx.AsyncByteStream):
    """The answer to one request, and its body as an async iterator of bytes, undecoded.

    A step yields all that has arrived since the last one, and does not suspend when something has; what `on_piece` has
    taken is not among it.
    `trailers` is filled when the iteration has ended. Errors while iterating: `httpx.RemoteProtocolError`
    for a body cut short or malformed, `httpx.ReadError` for a reset, `httpx.ReadTimeout`, or whatever the
    request's own stream raised.
    """

    # Defaults of the class, not of each answer: a third of the cost of making one.
    status = 0
    reason = b""
    http_version = b"HTTP/1.1"
    fields: Fields
    ended = False
    _error: BaseException | None = None
    _waiting_bytes = 0
    _paused = False
    _waiter: asyncio.Future[None] | None = None
    # Takes a piece in the turn in which it arrives, and says whether it has; asked only while the reader waits for it.
    on_piece: Callable[[bytes], bool] | None = None
    reader: Reader | None = None
    _on_interim: Callable[[Interim], None] | None = None

    def __init__(self, line: Line, *, bodyless: bool, read_timeout_s: float | None) -> None:
        self.bodyless = bodyless
        self.trailers: Fields = []
        self._line = line
        self._read_timeout_s = read_timeout_s
        self._chunks: list[bytes] = []

    async def head(self, *, on_interim: Callable[[Interim], None] | None = None) -> None:
        """Wait until status, reason and fields stand here; `on_interim` takes what comes before."""
        self._on_interim = on_interim
        try:
            while not self.status:
                if self._error is not None:
                    self._raise(self._error)
                await self._wait()
        finally:
            self._on_interim = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        chunks = self._chunks
        while not chunks:
            if self._error is not None:
                self._raise(self._error)
            if self.ended:
                raise StopAsyncIteration
            await self._wait()
        chunk = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._waiting_bytes = 0
        if self._paused:
            self._paused = False
            self._line.resume_reading()
        return chunk

    async def aclose(self) -> None:
        """Drop the connection unless the answer has ended; then it is already back in the pool."""
        self._chunks.clear()
        self.on_piece = None  # whose it is may well hold this answer: a cycle for the garbage collector
        if not self.ended:
            self._line.fail(httpx.ReadError("the answer was closed before its end"))

    @property
    def has_more(self) -> bool:
        """Whether the next step yields at once."""
        return bool(self._chunks)

    @property
    def is_whole(self) -> bool:
        """Whether all of it has come."""
        return self.ended and self._error is None

    def whole(self) -> bytes | None:
        """Return all of the body if it has come to its end and nothing of it was read, else None: then iterate."""
        if not self.is_whole or self.trailers:
            return None
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        return body

    # From the connection

    @property
    def ends_with_line(self) -> bool:
        """Whether the end of the connection is the end of this body (RFC 9112 §6.3, 4 and 8)."""
        if not self.status:
            return False
        codings = b""
        for name, value in self.fields:
            name = name.lower()
            if name == b"content-length":
                return False
            if name == b"transfer-encoding":
                codings = value
        return not codings.lower().rstrip().endswith(b"chunked")

    def add_interim(self, interim: Interim) -> None:
        take = self._on_interim if self.reader is None else self.reader.take_interim
        if take is not None:
            take(interim)

    def add(self, chunk: bytes) -> None:
        if self.on_piece is not None and self._waiter is not None and not self._chunks and self.on_piece(chunk):
            return
        self._chunks.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._waiting_bytes > WAITING_BYTES and not self._paused:
            self._paused = True
            self._line.pause_reading()

    def end(self, error: BaseException | None = None) -> None:
        self.ended = True
        self._error = error
        if self._paused:
            self._paused = False
            self._line.resume_reading()

    def nudge(self) -> None:
        """Let the reader have an empty piece: it has something to do."""
        self._chunks.append(b"")

    def wake(self) -> None:
        """Let whoever waits go on, unless there is nothing for it; the connection's last act in its turn."""
        reader = self.reader
        if reader is not None:
            if self.status or self.ended:
                self.reader = None
                reader.arrived()
            return
        waiter = self._waiter
        if waiter is not None and (self._chunks or self.ended or self.on_piece is None):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _raise(self, error: BaseException) -> NoReturn:
        # An exception kept here would hold its traceback, that this frame, and this the answer: a cycle.
        self._error = httpx.ReadError("the answer has failed before")
        try:
            raise error
        finally:
            del error

    def _give_up(self, error: httpx.TransportError) -> None:
        # Once ended, the connection may be carrying somebody else's exchange.
        if not self.ended:
            self._line.fail(error)

    async def _wait(self) -> None:
        loop = self._line.loop
        waiter = self._waiter = loop.create_future()
        timer = None
        if self._read_timeout_s is not None:
            silence = httpx.ReadTimeout(f"nothing received for {self._read_timeout_s} s")
            timer = loop.call_later(self._read_timeout_s, self._give_up, silence)
        try:
            await waiter
        except BaseException:
            self._give_up(httpx.ReadError("the reader was cancelled"))
            raise
        finally:
            if timer is not None:
                timer.cancel()
