"""The load: wrk for closed loops, and lean clients of our own for streams, latency and bulk.

Every function takes the address of a proxy, or of the upstream itself to learn what the load can do alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.upstream import STAMP_DIGITS, STAMP_MARK

OPENING_AT_ONCE = 64  # streams that may wait for their first byte while the next ones connect
OPENING_TIMEOUT_S = 60.0
SOCKET_TIMEOUT_S = 120.0
CONTROL_TIMEOUT_S = 20.0
BLOCK_BYTES = 262_144

CHAT_BODY = (
    '{"model":"gpt-4o-mini","messages":[{"role":"system","content":"You are a helpful assistant."},'
    '{"role":"user","content":"What does a proxy cost, when it does nothing but pass bytes along?"}]}'
)
STREAM_BODY = CHAT_BODY[:-1] + ',"stream":true}'

WRK_SCRIPT = """
wrk.method = "POST"
wrk.body = [=[%s]=]
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-bench-0123456789abcdef"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\n{"requests":%%d,"duration_us":%%d,"errors":%%d}\\n', summary.requests,
    summary.duration, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class LoadError(Exception):
    """The answers were not what was asked for, so that there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class Address:
    port: int
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"


def request_bytes(method: str, target: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    return b"".join((request_head(method, target, len(body), content_type), body))


def request_head(method: str, target: str, body_bytes: int, content_type: str = "application/json") -> bytes:
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: 127.0.0.1",
        "Authorization: Bearer sk-bench-0123456789abcdef",
    ]
    if body_bytes:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {body_bytes}"]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def no_collections() -> Iterator[None]:
    """Keep the collector's pauses out of the clients' clocks."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


# ---- closed loop


@dataclass(frozen=True, slots=True)
class Loop:
    requests: int
    seconds: float


def closed_loop(address: Address, *, connections: int, seconds: int, wrk: str, script: Path) -> Loop:
    """Return what wrk got through; LoadError when an answer was not a success."""
    argv = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
    run = subprocess.run(
        [*argv, f"{address.url}/v1/chat/completions"], capture_output=True, text=True, timeout=seconds + 30
    )
    if run.returncode:
        raise LoadError(f"wrk: {run.stderr.strip()}")
    counts = json.loads(run.stdout.rstrip().rsplit("\n", 1)[-1])
    if counts["errors"] or not counts["requests"]:
        raise LoadError(f"wrk saw {counts['errors']} errors in {counts['requests']} requests")
    return Loop(counts["requests"], counts["duration_us"] / 1e6)


# ---- event streams


@dataclass(slots=True)
class Window:
    """What arrived on all streams while `recording`."""

    recording: bool = False
    lateness_us: list[int] = field(default_factory=list)
    cut: int = 0
    closing: bool = False


_read_buffer = bytearray(262_144)  # one for all streams: what a read brought is looked at before the next


class StreamClient(asyncio.BufferedProtocol):
    """One open stream; notes how late each event is, by the stamp in it."""

    def __init__(self, window: Window, target: str) -> None:
        self._window = window
        self._request = request_bytes("POST", target, STREAM_BODY.encode())
        self.first_event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(self._request)

    def get_buffer(self, sizehint: int) -> bytearray:
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._window.recording:
            now_us = time.monotonic_ns() // 1000
            at = _read_buffer.find(STAMP_MARK, 0, nbytes)
            while at >= 0:
                # An event cut in two by a read's end is left out; the count of events allows for a few.
                stamp = _read_buffer[at + 2 : min(at + 2 + STAMP_DIGITS, nbytes)]
                if len(stamp) == STAMP_DIGITS and stamp.isdigit():
                    self._window.lateness_us.append(now_us - int(stamp))
                at = _read_buffer.find(STAMP_MARK, at + 2, nbytes)
        elif not self.first_event.done():
            self._head += _read_buffer[:nbytes]
            if not self._head.startswith(b"HTTP/1.1 200"):
                self.first_event.set_exception(LoadError(f"a stream was answered {self._head[:200]!r}"))
            elif STAMP_MARK in self._head:
                self.first_event.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._window.cut += not self._window.closing
        if not self.first_event.done():
            self.first_event.set_exception(LoadError("a stream ended before its first event"))


@asynccontextmanager
async def open_streams(address: Address, *, streams: int, rate_per_s: int) -> AsyncIterator[Window]:
    """Hold this many endless streams, each past its first event and silent until `start_streams`."""
    window = Window()
    target = f"/v1/chat/completions?rate={rate_per_s}"
    clients: list[StreamClient] = []
    gate = asyncio.Semaphore(OPENING_AT_ONCE)
    loop = asyncio.get_running_loop()
    host = "127.0.0.1" if address.tls else None

    async def open_one() -> None:
        async with gate:
            client = StreamClient(window, target)
            clients.append(client)
            await loop.create_connection(
                lambda: client, "127.0.0.1", address.port, ssl=address.tls, server_hostname=host
            )
            await client.first_event

    opening = [loop.create_task(open_one()) for _ in range(streams)]
    try:
        try:
            async with asyncio.timeout(OPENING_TIMEOUT_S):
                await asyncio.gather(*opening)
        except (OSError, TimeoutError) as exc:
            raise LoadError(f"{len(clients)} of {streams} streams opened: {exc!r}") from exc
        yield window
    finally:
        window.closing = True
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for client in clients:
            if client.first_event.done() and not client.first_event.cancelled():
                client.first_event.exception()
            if hasattr(client, "transport"):
                client.transport.abort()
        await asyncio.sleep(0.05)  # let the loop tell the kernel before it is closed


async def _ask_upstream(upstream: Address, target: str) -> dict[str, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
    try:
        writer.write(request_head("GET", target, 0))
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            await reader.readuntil(b"\r\n\r\n")
            return json.loads(await reader.readuntil(b"}"))
    finally:
        writer.close()


async def start_streams(upstream: Address) -> None:
    """Make the events of all open streams flow; upstream is its plain door."""
    await _ask_upstream(upstream, "/bench/go")


async def wait_until_quiet(upstream: Address, *, timeout_s: float = 10.0) -> None:
    """Return when the upstream has no stream left: the proxies have noticed that their clients went away."""
    deadline_s = time.monotonic() + timeout_s
    while (await _ask_upstream(upstream, "/bench/streams"))["streams"]:
        if time.monotonic() > deadline_s:
            raise LoadError("streams stay open at the upstream after their clients have gone")
        await asyncio.sleep(0.1)


# ---- open loop


class AnswerClient(asyncio.Protocol):
    """One keep-alive connection that answers `ask` with the time of the last byte, in ns."""

    def __init__(self) -> None:
        self._answered: asyncio.Future[int] | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def ask(self, request: bytes) -> asyncio.Future[int]:
        self._answered = asyncio.get_running_loop().create_future()
        self._received = b""
        self.transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._received += data
        if self._answered is None or self._answered.done() or not answer_is_whole(self._received):
            return
        if self._received.startswith(b"HTTP/1.1 200"):
            self._answered.set_result(now_ns)
        else:
            self._answered.set_exception(LoadError(f"answered {self._received[:200]!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(LoadError("a connection was closed before its answer"))


def answer_is_whole(received: bytes) -> bool:
    """Tell whether a head and the body it announces by Content-Length are there; LoadError without."""
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    raise LoadError(f"an answer without a Content-Length: {head[:200]!r}")


async def open_loop(address: Address, *, rate_per_s: int, seconds: float, connections: int = 16) -> list[float]:
    """Return each request's time from when it was due to its last byte, in ms."""
    loop = asyncio.get_running_loop()
    host = "127.0.0.1" if address.tls else None
    clients = [
        (await loop.create_connection(AnswerClient, "127.0.0.1", address.port, ssl=address.tls, server_hostname=host))[
            1
        ]
        for _ in range(connections)
    ]
    free = list(clients)
    latency_ms: list[float] = []
    request = request_bytes("POST", "/v1/chat/completions", CHAT_BODY.encode())

    async def ask(due_ns: int) -> None:
        if not free:
            raise LoadError(f"{connections} connections do not keep up with {rate_per_s} requests/s")
        client = free.pop(0)
        answered_ns = await client.ask(request)
        free.append(client)
        latency_ms.append((answered_ns - due_ns) / 1e6)

    try:
        # Each connection once beforehand: setting it up is not what is measured.
        for client in clients:
            await client.ask(request)
        start_ns = time.monotonic_ns() + 50_000_000
        asked = []
        for i in range(round(rate_per_s * seconds)):
            due_ns = start_ns + i * 1_000_000_000 // rate_per_s
            await _until(due_ns)
            asked.append(loop.create_task(ask(due_ns)))
        async with asyncio.timeout(SOCKET_TIMEOUT_S):
            await asyncio.gather(*asked)
    finally:
        for client in clients:
            client.transport.abort()
    return latency_ms


async def _until(due_ns: int) -> None:
    """Wait on the loop's clock, then spin: that clock counts in ms, and which would be on each figure."""
    wait_s = (due_ns - time.monotonic_ns()) / 1e9 - 0.002
    if wait_s > 0:
        await asyncio.sleep(wait_s)
    while time.monotonic_ns() < due_ns:  # noqa: ASYNC110 no event tells the time
        await asyncio.sleep(0)


# ---- bulk


@contextmanager
def _connected(address: Address) -> Iterator[socket.socket]:
    sock = socket.create_connection(("127.0.0.1", address.port), timeout=SOCKET_TIMEOUT_S)
    try:
        if address.tls:
            sock = address.tls.wrap_socket(sock, server_hostname="127.0.0.1")
        yield sock
    finally:
        sock.close()


def upload(address: Address, size_bytes: int) -> float:
    """Send a multipart file of this size; return the seconds until its answer."""
    start = b'--bench\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    end = b"\r\n--bench--\r\n"
    block = b"\0" * BLOCK_BYTES
    began_s = time.monotonic()
    with _connected(address) as sock:
        body_bytes = len(start) + size_bytes + len(end)
        sock.sendall(request_head("POST", "/v1/files", body_bytes, "multipart/form-data; boundary=bench") + start)
        for sent in range(0, size_bytes, BLOCK_BYTES):
            sock.sendall(block[: size_bytes - sent])
        sock.sendall(end)
        _read_answer(sock)
    return time.monotonic() - began_s


def download(address: Address, size_bytes: int) -> float:
    """Fetch a file of this size; return the seconds until its last byte."""
    began_s = time.monotonic()
    with _connected(address) as sock:
        sock.sendall(request_head("GET", f"/v1/files/x/content?bytes={size_bytes}", 0))
        received = _read_answer(sock)
    if received != size_bytes:
        raise LoadError(f"a download of {size_bytes} bytes brought {received}")
    return time.monotonic() - began_s


def get(address: Address, target: str) -> int:
    """Return the body's length; LoadError on any status but 2xx, OSError when nobody listens."""
    with _connected(address) as sock:
        sock.sendall(request_head("GET", target, 0))
        return _read_answer(sock)


def _read_answer(sock: socket.socket) -> int:
    """Return the length of the body, read and dropped; LoadError unless the status is 2xx."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = sock.recv(65_536)
        if not data:
            raise LoadError(f"closed before the end of the head: {received[:200]!r}")
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 2"):
        raise LoadError(f"answered {received[:200]!r}")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    total = int(lengths[0]) if lengths else 0
    count = len(body)
    buffer = bytearray(BLOCK_BYTES)
    while count < total:
        nbytes = sock.recv_into(buffer)
        if not nbytes:
            raise LoadError(f"closed after {count} of {total} bytes")
        count += nbytes
    return count
