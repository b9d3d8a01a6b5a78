"""The practice upstream in the place of the network: an httpx transport that answers by itself."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx2 as httpx

from gateway.sandbox.fields import SandboxError
from gateway.sandbox.router import Sandbox
from gateway.sandbox.trouble import Manner
from gateway.sandbox.wire import Answer, error_answer, head_of

MOST_BODY_BYTES = 32 * 1024 * 1024
_CHUNK_BYTES = 64 * 1024
# Speech is spoken bit by bit: of a slow model's that can be seen.
SLOW_SPEECH_PARTS = 8


@dataclass(frozen=True, slots=True)
class Pace:
    """Pauses in seconds. `event_s` shrinks for long streams, so that they pause `stream_s` in all at most."""

    event_s: float = 0.015
    stream_s: float = 0.9
    slow_first_s: float = 2.0
    slow_event_s: float = 0.3

    def between(self, events: int, manner: Manner) -> float:
        if manner is Manner.SLOW:
            return self.slow_event_s
        return min(self.event_s, self.stream_s / max(1, events))


class SandboxTransport(httpx.AsyncBaseTransport):
    """Answers every request from `sandbox`; raises ReadError and ReadTimeout as the network's does."""

    def __init__(self, *, sandbox: Sandbox | None = None, pace: Pace | None = None) -> None:
        self.sandbox = sandbox or Sandbox()
        self._pace = pace or Pace()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        target: bytes = request.extensions.get("target", request.url.raw_path)
        timeout_s: float | None = request.extensions.get("timeout", {}).get("read")
        try:
            body = await _read_body(request)
        except SandboxError as error:
            answer, body = error_answer(error), b""
        else:
            content_type = request.headers.get("content-type", "").encode("latin-1", errors="replace")
            answer = self.sandbox.answer(request.method, target, content_type, body)
        if answer.manner is Manner.HANG:
            await _silence(None, timeout_s)
        if answer.manner is Manner.SLOW:
            await _silence(self._pace.slow_first_s, timeout_s)
        request_id = _request_id(request.method.encode() + b" " + target, body)
        head_only = request.method == "HEAD"
        return httpx.Response(
            answer.status,
            headers=head_of(answer, request_id=request_id),
            stream=_Body(answer, self._pace, timeout_s, empty=head_only),
            extensions={"http_version": b"HTTP/1.1"},
        )

    async def aclose(self) -> None:
        """Nothing is open between requests; what was stored stays with the sandbox."""


async def _read_body(request: httpx.Request) -> bytes:
    """Return the whole body; SandboxError 413 as soon as it is too large, with the rest unread."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) < 20 and int(length) > MOST_BODY_BYTES:
        raise _too_large()
    if not isinstance(request.stream, httpx.AsyncByteStream):
        raise TypeError("SandboxTransport needs a request with an async body")
    body = bytearray()
    async for chunk in request.stream:
        body += chunk
        if len(body) > MOST_BODY_BYTES:
            raise _too_large()
    return bytes(body)


def _request_id(line: bytes, body: bytes) -> str:
    digest = hashlib.blake2b(line + b"\n", digest_size=16)
    digest.update(body)
    return "req_" + digest.hexdigest()


def _too_large() -> SandboxError:
    return SandboxError(
        413, f"The sandbox reads requests of up to {MOST_BODY_BYTES // 2**20} MiB.", code="request_too_large"
    )


async def _silence(seconds: float | None, timeout_s: float | None) -> None:
    """Wait so long, None is for ever; ReadTimeout when the caller's patience is shorter."""
    if timeout_s is not None and (seconds is None or seconds > timeout_s):
        await asyncio.sleep(timeout_s)
        raise httpx.ReadTimeout("The sandbox kept silent, as its model says.")
    if seconds is None:
        await asyncio.Event().wait()
    else:
        await asyncio.sleep(seconds)


class _Body(httpx.AsyncByteStream):
    """An answer's body: one event a chunk with a pause before each but the first, or plain bytes at once."""

    def __init__(self, answer: Answer, pace: Pace, timeout_s: float | None, *, empty: bool) -> None:
        is_slow_speech = answer.manner is Manner.SLOW and answer.content_type.startswith("audio/")
        chunk_bytes = -(-len(answer.body) // SLOW_SPEECH_PARTS) if is_slow_speech else _CHUNK_BYTES
        self._chunks = () if empty else answer.events or _slices(answer.body, chunk_bytes)
        self._cut = answer.manner is Manner.CUT
        is_paced = bool(answer.events) or is_slow_speech
        self._pause_s = pace.between(len(answer.events), answer.manner) if is_paced else 0.0
        self._timeout_s = timeout_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = _first_half(self._chunks) if self._cut else self._chunks
        for number, chunk in enumerate(chunks):
            if number and self._pause_s:
                await _silence(self._pause_s, self._timeout_s)
            yield chunk
        if self._cut:
            raise httpx.ReadError("The sandbox dropped the line, as its model says.")

    async def aclose(self) -> None:
        self._chunks = ()


def _slices(body: bytes, size_bytes: int) -> tuple[bytes, ...]:
    return tuple(body[start : start + size_bytes] for start in range(0, len(body), max(1, size_bytes)))


def _first_half(chunks: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return half of the chunks, or half of the only one."""
    if len(chunks) == 1:
        return (chunks[0][: len(chunks[0]) // 2],)
    return chunks[: len(chunks) // 2]
