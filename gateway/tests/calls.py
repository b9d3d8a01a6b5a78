"""One request through a transport, without a client: what the relay does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import httpx2 as httpx

from gateway.tests.fake_upstream import FakeUpstream

Fields = list[tuple[bytes, bytes]]
MakeTransport = Callable[..., httpx.AsyncBaseTransport]
LENGTH_OF_A_GIGABYTE = (b"Content-Length", b"1073741824")
CHUNKED = (b"Transfer-Encoding", b"chunked")
PATIENCE_S = 60.0  # only a failing test waits so long
# How soon the other end must know that one has left: milliseconds where nothing else runs, seconds on a busy machine.
# What would be left to a time limit takes longer: 15 s is the shortest of those that production has.
LEFT_WITHIN_S = 10.0


def request_to(
    url: str,
    target: bytes = b"/v1/models",
    *,
    method: str = "GET",
    fields: Fields | None = None,
    body: bytes | AsyncIterable[bytes] = b"",
    timeouts: dict[str, float | None] | None = None,
) -> httpx.Request:
    """Build a request whose Host and Content-Length stand where the caller has not put its own framing."""
    headers = [(b"Host", b"api.example"), *(fields or [])]
    if isinstance(body, bytes) and body and not any(name.lower() == b"content-length" for name, _ in headers):
        headers.append((b"Content-Length", b"%d" % len(body)))
    stream: Any = httpx.ByteStream(body) if isinstance(body, bytes) else _AsyncStream(body)
    extensions: dict[str, Any] = {"target": target}
    if timeouts is not None:
        extensions["timeout"] = timeouts
    request = httpx.Request(method, url, headers=headers, stream=stream, extensions=extensions)
    request.method = method
    return request


async def call(
    transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, *args: Any, **kwargs: Any
) -> httpx.Response:
    return await transport.handle_async_request(request_to(upstream.url, *args, **kwargs))


async def read(response: httpx.Response) -> bytes:
    body = b"".join([chunk async for chunk in response.stream])  # type: ignore[union-attr]
    await response.aclose()
    return body


async def fetch(
    transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, *args: Any, **kwargs: Any
) -> tuple[int, bytes]:
    response = await call(transport, upstream, *args, **kwargs)
    return response.status_code, await read(response)


async def signal_from(upstream: FakeUpstream, *, within_s: float = PATIENCE_S) -> Any:
    """Return what a script put into `upstream.signals`; queue.Empty when nothing came in time."""
    return await asyncio.to_thread(upstream.signals.get, True, within_s)


async def until(condition: Callable[[], bool], *, within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition was never met")
        await asyncio.sleep(0.002)


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, parts: AsyncIterable[bytes]) -> None:
        self._parts = parts

    def __aiter__(self) -> Any:
        return aiter(self._parts)


async def endless(part: bytes = b"x" * 65536) -> AsyncIterator[bytes]:
    while True:
        yield part
