"""What hostile clients and upstreams send, for tests and for `bench.abuse`; and an upstream that takes all of it."""

from __future__ import annotations

import zlib

from websockets.frames import Frame, Opcode
from websockets.utils import accept_key

from gateway.tests.attacks import MIB
from gateway.tests.fake_upstream import Exchange, Gate

# Bodies

NESTED = b'{"model":"m","stream":true,"messages":' + b"[" * 2_000_000
BOMBS = {
    "nested lists": NESTED,
    "nested objects": b'{"a":' * 400_000,
    "closed": b'{"stream":true,"messages":' + b"[" * 1_500_000 + b"]" * 1_500_000 + b"}",
    "a number": b'{"stream":true,"n":' + b"9" * 4_000_000 + b"}",
    "an exponent": b'{"stream":true,"n":1e' + b"9" * 4_000_000 + b"}",
    "one name again and again": b"{" + b'"stream":true,' * 270_000 + b'"model":"m"}',
    "many names": b"{" + b",".join(b'"%d":0' % number for number in range(350_000)) + b"}",
    "escapes": b'{"stream":true,"model":"' + b"\\u0041" * 650_000 + b'"}',
    "backslashes": b'{"stream":true,"model":"' + b"\\" * 4_000_000,
    "quotes": b'{"stream":true,' + b'"' * 4_000_000,
    "blanks": b" " * 4_000_000 + b"{}",
}

# Answers


def bomb(size: int) -> bytes:
    """Return so many blanks, packed a thousand times smaller."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(b" " * MIB) for _ in range(size // MIB)) + packer.flush()


ENDLESS = {
    "one line": b"x" * 65536,
    "comments": b":\n" * 32768,
    "lines of data": b"data: x\n" * 8192,
    "returns": b"\ndata: x\r" * 6500,
}

# WebSockets

SHAKE = (
    b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
FLOODS = {
    "empty messages": Frame(Opcode.TEXT, b"").serialize(mask=True) * 40_000,
    "small messages": Frame(Opcode.TEXT, b"{}").serialize(mask=True) * 30_000,
    "empty fragments": Frame(Opcode.TEXT, b"", fin=False).serialize(mask=True)
    + Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 40_000,
    "pings": Frame(Opcode.PING, b"p" * 125).serialize(mask=True) * 2_000,
}


# The upstream


async def swallow(exchange: Exchange) -> None:
    """Read whatever comes, keep nothing, and answer."""
    while await exchange.read_some_body():
        exchange.request.body.clear()
    await exchange.answer(b'{"data": []}')


async def hold_websocket(exchange: Exchange, gate: Gate) -> None:
    """Accept a WebSocket and read nothing of it until the gate is open."""
    accept = accept_key(exchange.request.value("sec-websocket-key") or "")
    lines = ["HTTP/1.1 101 Yes", "Upgrade: websocket", "Connection: upgrade", f"Sec-WebSocket-Accept: {accept}"]
    await exchange.send("\r\n".join([*lines, "", ""]).encode())
    await gate.wait(300)
    exchange.abort()
