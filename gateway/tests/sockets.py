"""WebSocket clients, one of them of single bytes, and an upstream's side of it by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.utils import accept_key

from gateway.tests.calls import PATIENCE_S
from gateway.tests.fake_realtime import MIB
from gateway.tests.fake_upstream import Exchange
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

LIMIT = 16 * MIB
KEY = "sk-test-never-in-a-log-5f1c"
BODY = "body-never-in-a-log-8a2e"


def dial(proxy: LiveProxy, target: str = "/v1/realtime?model=m", **options: object) -> connect:
    options = {"proxy": None, "max_size": None, "ping_interval": None, "compression": None} | options
    options = {"open_timeout": PATIENCE_S} | options
    return connect(proxy.url.replace("http", "ws") + target, **options)  # type: ignore[arg-type]


async def refusal(proxy: LiveProxy, target: str = "/v1/realtime?model=m", **options: object) -> Response:
    with pytest.raises(InvalidStatus) as caught:
        await dial(proxy, target, **options)
    return caught.value.response


def error_code(response: Response) -> str:
    return str(json.loads(response.body)["error"]["code"])


async def end_of(websocket: ClientConnection) -> tuple[int | None, str | None]:
    """Return code and reason with which the connection ends, without sending anything."""
    with contextlib.suppress(ConnectionClosed):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await websocket.recv()
    return websocket.close_code, websocket.close_reason


async def settled(read: Callable[[], int]) -> int:
    """Return the value once it has stood still for half a second."""
    value, since = read(), time.monotonic()
    while time.monotonic() - since < 0.5:
        await asyncio.sleep(0.02)
        if read() != value:
            value, since = read(), time.monotonic()
    return value


class RawSocket(RawClient):
    """A WebSocket client of single bytes."""

    def __init__(self, proxy: LiveProxy, target: str = "/v1/realtime?model=m", *headers: str) -> None:
        super().__init__(proxy)
        self.request(
            "GET",
            target,
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            *headers,
        )

    def opened(self) -> RawSocket:
        assert self.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        return self

    def frame(self, opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> None:
        self.send(Frame(opcode, data, fin=fin).serialize(mask=True))

    def next_frame(self) -> tuple[Opcode, bytes]:
        first, length = self.read_exactly(2)
        if length == 126:
            length = int.from_bytes(self.read_exactly(2), "big")
        elif length == 127:
            length = int.from_bytes(self.read_exactly(8), "big")
        return Opcode(first & 15), self.read_exactly(length)

    def next_but_pings(self) -> tuple[Opcode, bytes]:
        while (frame := self.next_frame())[0] is Opcode.PING:
            pass
        return frame


async def shake_hands(exchange: Exchange, *headers: str) -> None:
    """Accept a WebSocket by hand."""
    accept = accept_key(exchange.request.value("sec-websocket-key") or "")
    lines = ["HTTP/1.1 101 Yes", "Upgrade: websocket", "Connection: upgrade", f"Sec-WebSocket-Accept: {accept}"]
    await exchange.send("\r\n".join([*lines, *headers, "", ""]).encode())


def server_frame(opcode: Opcode, data: bytes) -> bytes:
    return Frame(opcode, data).serialize(mask=False)


def errors_in(log: str) -> list[str]:
    """Return the lines that ordinary traffic must not leave there."""
    return [line for line in log.splitlines() if "Traceback" in line or " ERROR " in line or "[ERROR]" in line]


def secrets_in(log: str) -> list[str]:
    """Return which keys, messages and paths of these tests stand where none may."""
    return [secret for secret in (KEY, BODY, "/v1/realtime", "/nothing") if secret in log]
