"""Content codings undone piece by piece, for a copy that is only looked at: bounded, and never an exception. Pure.

`gzip` and `deflate` come with Python; `br` needs the package brotli from 1.2 on, `zstd` Python 3.14 or backports.zstd.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from importlib import import_module
from typing import Any, Protocol

from gateway.errors import UpstreamProtocolError

_STEP_BYTES = 256 << 10
_FREE_BYTES = 1 << 20
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class _Coding(Protocol):
    """One content coding. Raises whatever its library raises."""

    def decode(self, data: bytes) -> bytes:
        """Return at most about `_STEP_BYTES` decoded from `data`, and b"" once nothing is left of it."""

    @property
    def has_ended(self) -> bool:
        """Whether what was read so far is whole by its own account."""


class Decoder:
    """Undoes one Content-Encoding. Gives up, for good, at `gave_up`: a coding that is unknown or combined with
    another, broken data, or more output than `max_bytes`, or than `max_ratio` times the input beyond 1 MiB.
    """

    def __init__(self, content_encoding: bytes, *, max_bytes: int = 256 << 20, max_ratio: int = 200) -> None:
        make = _CODINGS.get(content_encoding.strip().lower())
        self._coding: _Coding | None = make() if make else None
        self._max_bytes = max_bytes
        self._max_ratio = max_ratio
        self._input_bytes = self._output_bytes = 0
        self.gave_up = self._coding is None

    def feed(self, chunk: bytes) -> bytes:
        """Return what the next bytes of the body decode to, b"" after giving up."""
        return b"".join(self.parts(chunk))

    def parts(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the same in parts of about 256 KiB at most: a bomb is never in memory as a whole."""
        self._input_bytes += len(chunk)
        while part := self._decoded(chunk):
            chunk = b""
            self._output_bytes += len(part)
            if self._is_too_much():
                self._give_up()
            yield part

    @property
    def is_cut(self) -> bool:
        """Whether the body must not end here. One without any bytes may: there is nothing in it to be cut."""
        return self._coding is not None and self._input_bytes > 0 and not self._coding.has_ended

    def _decoded(self, chunk: bytes) -> bytes:
        if self._coding is None:
            return b""
        try:
            return self._coding.decode(chunk)
        except Exception:  # of three libraries, each with its own; a copy that cannot be read is no failure
            self._give_up()
            return b""

    def _is_too_much(self) -> bool:
        allowed = max(_FREE_BYTES, self._max_ratio * self._input_bytes)
        return self._output_bytes > min(allowed, self._max_bytes)

    def _give_up(self) -> None:
        self.gave_up = True
        self._coding = None


async def unpacked(chunks: AsyncIterable[bytes], decoder: Decoder) -> AsyncIterator[bytes]:
    """Yield what a stream of chunks decodes to, and let others have their turn within a chunk that holds a lot.

    Raises UpstreamProtocolError where the decoder gives up, and where the stream ends before its coding does: an
    upstream whose body ends with its connection can cut it in no other way that shows.
    """
    async for chunk in chunks:
        for part in decoder.parts(chunk):
            yield part
            if len(part) >= _STEP_BYTES:
                await asyncio.sleep(0)
        if decoder.gave_up:
            raise UpstreamProtocolError("The upstream's compressed answer cannot be read.")
    if decoder.is_cut:
        raise UpstreamProtocolError("The upstream's compressed answer broke off.")


class _Identity:
    has_ended = True

    def decode(self, data: bytes) -> bytes:
        return data


class _Zlib:
    """One zlib stream or several gzip members, one behind the other (RFC 1952 §2.2)."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._member = zlib.decompressobj(wbits)
        self._rest = b""
        self._is_full = False

    @property
    def has_ended(self) -> bool:
        return self._member.eof

    def decode(self, data: bytes) -> bytes:
        data = self._rest + data
        self._rest = b""
        # After a full step output may be left although all input has been taken.
        while data or self._is_full:
            if self._member.eof and not self._begin_next(data := data.lstrip(b"\0")):
                return b""
            out = self._member.decompress(data, _STEP_BYTES)
            self._is_full = len(out) == _STEP_BYTES
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if out:
                self._rest = data
                return out
        return b""

    def _begin_next(self, data: bytes) -> bool:
        self._is_full = False
        if not data or self._wbits != _GZIP:
            return False
        self._member = zlib.decompressobj(self._wbits)
        return True


class _Deflate:
    """`deflate`: zlib (RFC 9110 §8.4.1.2) or, from servers that took the name at its word, without its header."""

    def __init__(self) -> None:
        self._begun = b""
        self._coding: _Zlib | None = None

    @property
    def has_ended(self) -> bool:
        return self._coding is not None and self._coding.has_ended

    def decode(self, data: bytes) -> bytes:
        if self._coding is None:
            data = self._begun + data
            if len(data) < 2:
                self._begun = data
                return b""
            # RFC 1950 §2.2: method 8, and a check of both bytes.
            has_header = data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0
            self._coding = _Zlib(_ZLIB if has_header else _RAW)
        return self._coding.decode(data)


class _Brotli:
    def __init__(self) -> None:
        self._decompressor = _brotli.Decompressor()

    @property
    def has_ended(self) -> bool:
        ended: bool = self._decompressor.is_finished()
        return ended

    def decode(self, data: bytes) -> bytes:
        out: bytes = self._decompressor.process(data, output_buffer_limit=_STEP_BYTES)
        return out


class _Zstd:
    """Zstandard frames, one behind the other (RFC 8878 §3.1)."""

    def __init__(self) -> None:
        self._frame = self._new_frame()

    @property
    def has_ended(self) -> bool:
        ended: bool = self._frame.eof
        return ended

    def decode(self, data: bytes) -> bytes:
        while data or not self._frame.needs_input:
            if self._frame.eof:
                data = self._frame.unused_data + data
                if not data:
                    return b""
                self._frame = self._new_frame()
            out: bytes = self._frame.decompress(data, max_length=_STEP_BYTES)
            if out:
                return out
            data = b""
        return b""

    @staticmethod
    def _new_frame() -> Any:
        # A frame may ask for a window of 128 MiB; over HTTP 8 MiB are allowed (RFC 9659).
        return _zstd.ZstdDecompressor(options={_zstd.DecompressionParameter.window_log_max: 23})


def _module(*names: str) -> Any:
    """Return the first of these modules that is installed, None if none is."""
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            continue
    return None


_brotli = _module("brotli")
_zstd = _module("compression.zstd", "backports.zstd")

_CODINGS: dict[bytes, Callable[[], _Coding]] = {
    b"": _Identity,
    b"identity": _Identity,
    b"gzip": lambda: _Zlib(_GZIP),
    b"x-gzip": lambda: _Zlib(_GZIP),
    b"deflate": _Deflate,
}
# Older versions of brotli cannot bound what one call returns.
if hasattr(getattr(_brotli, "Decompressor", None), "can_accept_more_data"):
    _CODINGS[b"br"] = _Brotli
if _zstd is not None:
    _CODINGS[b"zstd"] = _Zstd

READABLE_CODINGS = frozenset(_CODINGS)
