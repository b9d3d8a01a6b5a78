"""Two small real egress proxies on 127.0.0.1: HTTP CONNECT (RFC 9110 §9.3.6) and SOCKS5 (RFC 1928, 1929)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from abc import ABC, abstractmethod

PATIENCE_S = 60.0


class EgressProxy(ABC):
    """Runs on a thread with a loop of its own; `asked_for` holds each host as the client named it."""

    scheme = ""

    def __init__(self, *, user: str = "", password: str = "") -> None:
        self.user = user
        self.password = password
        self.asked_for: list[tuple[str, int]] = []
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def url(self, scheme: str = "", *, password: str | None = None) -> str:
        login = f"{self.user}:{self.password if password is None else password}@" if self.user else ""
        return f"{scheme or self.scheme}://{login}127.0.0.1:{self.port}"

    def __enter__(self) -> EgressProxy:
        self._thread.start()
        if not self._ready.wait(PATIENCE_S):
            raise RuntimeError("the egress proxy did not start")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target = await self.handshake(reader, writer)
            if target is not None:
                self.asked_for.append(target)
                there = await asyncio.open_connection(*target)
                await self.welcome(writer)
                await asyncio.gather(_pump(reader, there[1]), _pump(there[0], writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @abstractmethod
    async def handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int] | None:
        """Return where the client wants to go, None where it is refused."""

    @abstractmethod
    async def welcome(self, writer: asyncio.StreamWriter) -> None:
        """Tell the client that the way is open."""


class ConnectProxy(EgressProxy):
    scheme = "http"

    async def handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int] | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.user and f"\r\nproxy-authorization: basic {login}\r\n".lower() not in head.lower():
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return None
        host, _, port = head.split(" ")[1].rpartition(":")
        return host.strip("[]"), int(port)

    async def welcome(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()


class Socks5Proxy(EgressProxy):
    scheme = "socks5"

    async def handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int] | None:
        _, count = await reader.readexactly(2)
        offered = await reader.readexactly(count)
        method = 2 if self.user else 0
        writer.write(bytes([5, method if method in offered else 0xFF]))
        if method == 2 and not await self._login(reader, writer):
            return None
        _, _, _, kind = await reader.readexactly(4)
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = ".".join(map(str, await reader.readexactly(4)))
        return host, int.from_bytes(await reader.readexactly(2), "big")

    async def _login(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        _, length = await reader.readexactly(2)
        user = (await reader.readexactly(length)).decode()
        password = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        right = (user, password) == (self.user, self.password)
        writer.write(bytes([1, 0 if right else 1]))
        await writer.drain()
        return right

    async def welcome(self, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes([5, 0, 0, 1, 127, 0, 0, 1, 0, 0]))
        await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
