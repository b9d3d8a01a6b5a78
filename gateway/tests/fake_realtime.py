"""A real WebSocket server on 127.0.0.1 that plays what a test scripts, on a thread with an event loop of its own::

async def script(websocket):
    async for message in websocket:
        await websocket.send(message)

with RealtimeUpstream(script) as upstream:
    ...  # upstream.url, upstream.requests, upstream.closed
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import ssl
import threading
from collections.abc import Awaitable, Callable

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

Script = Callable[[ServerConnection], Awaitable[None]]
MIB = 1 << 20
PATIENCE_S = 60.0  # only a failing test waits so long


async def echo(websocket: ServerConnection) -> None:
    async for message in websocket:
        await websocket.send(message)


class RealtimeUpstream:
    """`script`, `refuse`, `select` and `response_headers` may be replaced between connections."""

    def __init__(self, script: Script = echo, *, tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._tls = tls
        self.requests: list[Request] = []
        self.closed: queue.Queue[tuple[int | None, str | None]] = queue.Queue()
        self.signals: queue.Queue[object] = queue.Queue()
        self.failures: list[BaseException] = []
        self._open = 0
        self._changed = threading.Condition()
        self.play(script)

    def __enter__(self) -> RealtimeUpstream:
        self._thread.start()
        if not self._ready.wait(PATIENCE_S):
            raise RuntimeError("the fake upstream did not start")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)

    def play(self, script: Script = echo) -> None:
        self.script = script
        self.refuse: Callable[[Request], Response | None] = lambda request: None
        self.select: str | None = None
        self.response_headers: list[tuple[str, str]] = []
        self.requests.clear()
        self.closed.queue.clear()
        self.signals.queue.clear()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

    async def next_close(self, timeout_s: float = PATIENCE_S) -> tuple[int | None, str | None]:
        """Return code and reason with which the next connection ended, as the upstream saw it."""
        return await asyncio.to_thread(self.closed.get, True, timeout_s)

    def wait_until_idle(self, timeout_s: float = PATIENCE_S) -> bool:
        """Wait until every connection has ended and stands in `closed`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()

    async def next_signal(self, timeout_s: float = PATIENCE_S) -> object:
        return await asyncio.to_thread(self.signals.get, True, timeout_s)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with serve(
            self._connected,
            "127.0.0.1",
            0,
            ssl=self._tls,
            max_size=None,
            max_queue=1,
            ping_interval=None,
            open_timeout=PATIENCE_S,
            process_request=lambda connection, request: self._asked(request),
            process_response=lambda connection, request, response: self._answering(response),
            select_subprotocol=lambda connection, offers: self._selected(),
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self._ready.set()
            await self._stop.wait()

    def _selected(self) -> Subprotocol | None:
        return Subprotocol(self.select) if self.select else None

    def _asked(self, request: Request) -> Response | None:
        self.requests.append(request)
        return self.refuse(request)

    def _answering(self, response: Response) -> None:
        for name, value in self.response_headers:
            response.headers[name] = value

    async def _connected(self, websocket: ServerConnection) -> None:
        self._count(1)
        try:
            with contextlib.suppress(ConnectionClosed):
                await self.script(websocket)
        except Exception as exc:
            self.failures.append(exc)
            raise
        finally:
            await websocket.close()
            self.closed.put((websocket.close_code, websocket.close_reason))
            self._count(-1)
