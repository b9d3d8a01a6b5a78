"""gunicorn's worker: one process, one event loop, many streams."""

from __future__ import annotations

import asyncio
import gc
import logging
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
import uvicorn.server
from gunicorn.arbiter import Arbiter
from uvicorn_worker import UvicornWorker

from proxysite import settings
from proxysite.gunicorn_conf import RETIRE
from proxysite.http_protocol import HTTPProtocol
from proxysite.websocket import WebSocketProtocol

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = min(1.0, settings.HEADER_TIMEOUT_SECONDS / 4, settings.KEEPALIVE_SECONDS / 4)


class GatewayWorker(UvicornWorker):
    """uvicorn under gunicorn, with our protocols, and a shutdown that lets streams say that they were cut."""

    CONFIG_KWARGS = {
        "loop": "uvloop",
        "http": HTTPProtocol,
        "ws": WebSocketProtocol,
        "ws_max_size": settings.WEBSOCKET_MAX_MESSAGE_BYTES,
        "ws_per_message_deflate": False,
        "lifespan": "on",
        "interface": "asgi3",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
    }

    # Those that are at first as the system has them: a worker that is just born would die of this one.
    SIGNALS = [number for number in UvicornWorker.SIGNALS if number != RETIRE]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # One byte that this process and the master, in which the object is made, both see.
        self._begun = mmap.mmap(-1, 1)

    @property
    def has_begun(self) -> bool:
        """Whether the worker has accepted connections since it was started, as the master sees it too."""
        return self._begun[0] != 0

    def _begin(self) -> None:
        self._begun[0] = 1

    def init_signals(self) -> None:
        super().init_signals()
        # Until the loop runs: what is not heard now, the master says again.
        signal.signal(RETIRE, signal.SIG_IGN)

    def init_process(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        super().init_process()

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = Server(self.config, on_start=self._begin)
        # What the master sends on Ctrl-C; uvicorn's own handlers are for SIGTERM and SIGINT.
        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
        # Not the loop's: it may still be sent when the loop has ended.
        signal.signal(RETIRE, server.retire)
        # What was imported stays for good: the collector need not look at it with every few requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        # uvicorn reports to the master only while it accepts connections; the master kills the silent,
        # streams that may still finish included.
        tasks = [asyncio.create_task(self._beat(server)), asyncio.create_task(sweep_connections(server))]
        try:
            await server.serve(sockets=self.sockets)
            # The interpreter's end would undo any other handler, and the master may say it once more.
            signal.signal(RETIRE, signal.SIG_IGN)
        finally:
            for task in tasks:
                task.cancel()
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def _beat(self, server: Server) -> None:
        while True:
            self.notify()
            if os.getppid() != self.ppid and not server.is_stopped:
                # Without a master nobody would ever end this process, which holds the port.
                server.handle_exit(signal.SIGTERM, None)
            await asyncio.sleep(1)


class Server(uvicorn.server.Server):
    """Ends in one of two ways: retired, with its last stream; stopped, GRACEFUL_TIMEOUT_SECONDS later at the latest.

    One that was retired may still be stopped.
    """

    is_stopped = False

    def __init__(self, config: uvicorn.Config, *, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def retire(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn takes Ctrl-C for a second one where the server is already ending, as a retired one is.
        if sig == signal.SIGINT and not self.is_stopped:
            sig = signal.SIGTERM
        self.is_stopped = True
        super().handle_exit(sig, frame)

    async def _wait_tasks_to_complete(self) -> None:
        """Wait for what runs. Raises TimeoutError when it is to be cancelled, so that streams can say they were cut."""
        ending = asyncio.create_task(super()._wait_tasks_to_complete())
        while not (self.is_stopped or ending.done()):  # noqa: ASYNC110 - set by a signal
            await asyncio.sleep(0.1)
        for connection in list(self.server_state.connections):
            if isinstance(connection, WebSocketProtocol):
                connection.stop()
        await asyncio.wait_for(ending, settings.GRACEFUL_TIMEOUT_SECONDS)


async def sweep_connections(server: uvicorn.server.Server) -> None:
    """Close connections whose time is up."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        now = loop.time()
        for connection in list(server.server_state.connections):
            if not isinstance(connection, HTTPProtocol):
                continue
            try:
                connection.sweep(now)
            except Exception:  # of one of them; all others have deadlines too
                logger.exception("a connection could not be looked after")
                connection.transport.abort()
