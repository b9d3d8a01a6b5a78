"""Who says nothing on a WebSocket: dead or held up, in the handshake and after it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from websockets.frames import Close, Opcode

from gateway.tests.calls import PATIENCE_S
from gateway.tests.fake_realtime import MIB
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy
from gateway.tests.sockets import (
    RawSocket,
    dial,
    end_of,
    error_code,
    errors_in,
    refusal,
    server_frame,
    settled,
    shake_hands,
)

# Whoever is there has as long to answer a ping: on a busy machine that is little.
PING_S = 2.0


@pytest.fixture(scope="module")
def nervous_proxy(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    """A proxy with short time limits."""
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url,
        WEBSOCKET_PING_SECONDS=str(PING_S),
        FIRST_BYTE_TIMEOUT_SECONDS="2",
        SILENCE_TIMEOUT_SECONDS="2",
    ) as live:
        yield live


async def test_an_upstream_that_never_answers_is_a_504(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        wire.signals.put(await exchange.wait_until_client_leaves())

    wire.script = script
    response = await refusal(nervous_proxy)
    assert (response.status_code, error_code(response)) == (504, "upstream_timeout")
    assert response.headers["content-type"].startswith("application/json")
    await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)


async def test_an_upstream_that_takes_nothing_for_too_long_is_given_up(
    nervous_proxy: LiveProxy, wire: FakeUpstream
) -> None:
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await gate.wait(60)
        exchange.abort()

    def push() -> None:
        with contextlib.suppress(OSError):  # the proxy lets go some time after it has said so
            for _ in range(60):
                client.frame(Opcode.BINARY, b"b" * MIB)

    wire.script = script
    with RawSocket(nervous_proxy) as client:
        client.opened()
        pushing = asyncio.create_task(asyncio.to_thread(push))
        opcode, data = await asyncio.to_thread(client.next_but_pings)
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1011)
        client.socket.shutdown(socket.SHUT_RDWR)
        await pushing
    gate.open()


async def test_silence_with_pongs_is_no_reason_to_close(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        for _ in range(4):
            head = await exchange.reader.readexactly(6)
            data = await exchange.reader.readexactly(head[1] & 127)
            data = bytes(byte ^ head[2 + at % 4] for at, byte in enumerate(data))
            assert head[0] & 15 == Opcode.PING
            await exchange.send(server_frame(Opcode.PONG, data))
        await exchange.send(server_frame(Opcode.TEXT, b"four pings"))
        await exchange.wait_until_client_leaves()

    wire.script = script
    pinged = 0
    with RawSocket(nervous_proxy) as client:
        client.opened()
        while (frame := await asyncio.to_thread(client.next_frame))[0] is Opcode.PING:
            client.frame(Opcode.PONG, frame[1])
            pinged += 1
    assert frame == (Opcode.TEXT, b"four pings")
    assert pinged >= 3


async def test_a_dead_client_is_noticed(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        wire.signals.put("open")
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await exchange.reader.readexactly(6)
                data = await exchange.reader.readexactly(head[1] & 127)
                data = bytes(byte ^ head[2 + at % 4] for at, byte in enumerate(data))
                if head[0] & 15 == Opcode.CLOSE:
                    wire.signals.put(Close.parse(data).code)
                    await exchange.send(server_frame(Opcode.CLOSE, data))
                await exchange.send(server_frame(Opcode.PONG, data))

    wire.script = script
    with RawSocket(nervous_proxy) as client:
        opcode, data = await asyncio.to_thread(client.opened().next_but_pings)
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1011)
    assert await asyncio.to_thread(wire.signals.get, True, PATIENCE_S) == "open"
    assert await asyncio.to_thread(wire.signals.get, True, PATIENCE_S) == 1001


async def test_a_dead_upstream_is_noticed(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await exchange.wait_until_client_leaves()

    wire.script = script
    async with dial(nervous_proxy) as client:
        assert await end_of(client) == (1011, "upstream: keepalive ping timeout")


async def test_who_is_held_up_is_not_taken_for_dead(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    """The client reads nothing for many intervals; the pings on a second connection are the clock."""
    pushed = 0

    async def script(exchange: Exchange) -> None:
        nonlocal pushed
        await shake_hands(exchange)
        if exchange.request.target == "/v1/clock":
            await answer_pings(exchange, lambda: wire.signals.put("tick"))
            return
        answering = asyncio.create_task(answer_pings(exchange))
        for _ in range(100):
            await exchange.send(server_frame(Opcode.BINARY, b"m" * MIB))
            pushed += 1
        await answering

    wire.script = script
    with RawSocket(nervous_proxy) as client:
        client.opened()
        async with dial(nervous_proxy, "/v1/clock"):
            assert await settled(lambda: pushed) < 90
            for _ in range(6):
                await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)
        received = 0
        while received < 100:
            opcode, data = await asyncio.to_thread(client.next_but_pings)
            assert (opcode, len(data)) == (Opcode.BINARY, MIB)
            client.frame(Opcode.PONG)
            received += 1


async def answer_pings(exchange: Exchange, tick: Callable[[], None] = lambda: None) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            await exchange.reader.readexactly(6)
            await exchange.reader.readexactly(4)
            await exchange.send(server_frame(Opcode.PONG, b""))
            tick()


async def test_nothing_ordinary_is_logged_as_an_error(nervous_proxy: LiveProxy) -> None:
    """Runs last, over everything that this module has made the proxy do."""
    assert not errors_in(nervous_proxy.log)
