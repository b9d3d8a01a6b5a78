"""A real HTTP/1.1 server on 127.0.0.1 that plays whatever a test scripts, byte for byte.

It runs on a thread with an event loop of its own, so that tests may be sync or async::

    async def script(exchange):
        await exchange.send(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\n{}")

    with FakeUpstream(script) as upstream:
        ...  # upstream.url, upstream.requests
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

Script = Callable[["Exchange"], Awaitable[None]]
# Only a failing test waits so long.
PATIENCE_S = 60.0


@dataclass
class RecordedRequest:
    """One request as it stood on the wire; `body` grows until `complete`."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    connection: int
    raw_head: bytes
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def value(self, name: str) -> str | None:
        found = self.values(name)
        return found[0] if found else None


class Gate:
    """Holds a script between two chunks until the test opens it; may be waited on from both sides."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float = PATIENCE_S) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self._event.is_set():
            if loop.time() > deadline:
                raise TimeoutError("the gate was never opened")
            await asyncio.sleep(0.002)

    def wait_in_thread(self, timeout_s: float = PATIENCE_S) -> bool:
        return self._event.wait(timeout_s)

    def is_open(self) -> bool:
        return self._event.is_set()


class Exchange:
    """What a script holds: the request, and the raw connection to answer on."""

    def __init__(self, request: RecordedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self.reader = reader
        self.writer = writer
        self._body = _body_parts(request, reader)

    async def read_body(self) -> bytes:
        """Read the request body to its end and return all of it."""
        async for _ in self._body:
            pass
        return bytes(self.request.body)

    async def read_some_body(self) -> bytes:
        """Return the next part of the request body as it arrived, b"" at its end."""
        return await anext(self._body, b"")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(
        self,
        body: bytes = b"{}",
        *,
        status: str = "200 OK",
        headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),),
    ) -> None:
        """Send one whole answer with a Content-Length."""
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        lines += [f"content-length: {len(body)}", "", ""]
        await self.send("\r\n".join(lines).encode("latin-1") + body)

    async def start_stream(
        self,
        *,
        status: str = "200 OK",
        headers: tuple[tuple[str, str], ...] = (("content-type", "text/event-stream; charset=utf-8"),),
    ) -> None:
        """Send the head of a chunked answer."""
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        lines += ["transfer-encoding: chunked", "", ""]
        await self.send("\r\n".join(lines).encode("latin-1"))

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def events(self, *payloads: object, done: bool = True) -> None:
        """Send each payload as one SSE event in one chunk, then [DONE]."""
        for payload in payloads:
            await self.chunk(b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n")
        if done:
            await self.chunk(b"data: [DONE]\n\n")

    def abort(self) -> None:
        """Drop the line: the peer sees a reset."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """End the connection in an orderly way: the peer sees an end of file."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def wait_until_client_leaves(self, timeout_s: float = PATIENCE_S) -> float:
        """Return after how many seconds the peer had closed the connection; TimeoutError if it did not in time."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass
        return loop.time() - start


async def _body_parts(request: RecordedRequest, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    if (request.value("transfer-encoding") or "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            part = await reader.readexactly(size)
            await reader.readexactly(2)
            request.body += part
            yield part
        while (await reader.readline()) not in (b"\r\n", b""):
            pass
    else:
        left = int(request.value("content-length") or 0)
        while left and (part := await reader.read(min(left, 65536))):
            left -= len(part)
            request.body += part
            yield part
        if left:
            return
    request.complete = True


async def echo(exchange: Exchange) -> None:
    """Answer with the request itself as JSON: the script that a test gets when it names none."""
    body = await exchange.read_body()
    request = exchange.request
    answer = {
        "method": request.method,
        "target": request.target,
        "headers": request.headers,
        "body": body.decode("latin-1"),
    }
    await exchange.answer(json.dumps(answer).encode())


async def answer_at_once(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer()


def raw_answer(data: bytes, *, close: bool = False) -> Callable[[Exchange], Awaitable[None]]:
    """A script that reads the request and answers with these bytes."""

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(data)
        if close:
            await exchange.close()

    return script


def reset(exchange: Exchange) -> None:
    """Drop the line so that the peer, unless it has left already, sees a reset, not an end of file."""
    sock = exchange.writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.abort()


class FakeUpstream:
    """The server; `script` may be replaced between requests."""

    def __init__(self, script: Script = echo, *, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.requests: list[RecordedRequest] = []
        self.signals: queue.Queue[object] = queue.Queue()  # whatever a script wants a test to know
        self.connections_opened = 0
        self.failures: list[BaseException] = []
        self._tls = tls
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-upstream", daemon=True)
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeUpstream:
        self._thread.start()
        if not self._ready.wait(PATIENCE_S):
            raise RuntimeError("the fake upstream did not start")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)

    def drop_idle_connections(self) -> None:
        """Close every open connection, as servers do to connections kept alive too long."""
        done = threading.Event()

        def close_all() -> None:
            for writer in list(self._writers):
                writer.close()
            self.loop.call_later(0.02, done.set)

        self.loop.call_soon_threadsafe(close_all)
        assert done.wait(PATIENCE_S)

    @property
    def open_connections(self) -> int:
        return len(self._writers)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections_opened += 1
        number = self.connections_opened
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = _parse_head(head, number)
                self.requests.append(request)
                exchange = Exchange(request, reader, writer)
                await self.script(exchange)
                if writer.is_closing():
                    return
                await exchange.read_body()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        except Exception as exc:
            self.failures.append(exc)
            raise
        finally:
            self._writers.discard(writer)
            writer.close()


@contextlib.contextmanager
def hanging_up() -> Iterator[int]:
    """Serve on a port: take each connection, and close it before a byte has passed. As a full load balancer does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_S)


def _parse_head(head: bytes, connection: int) -> RecordedRequest:
    lines = head.decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = [tuple(line.split(": ", 1)) if ": " in line else (line.rstrip(":"), "") for line in lines[1:-2]]
    return RecordedRequest(method, target, headers, connection, head)  # type: ignore[arg-type]
