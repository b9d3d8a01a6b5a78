"""How a WebSocket through the live proxy ends: by a close, a break, or a server that stops."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.frames import Close, Opcode

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S
from gateway.tests.fake_realtime import MIB, RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.sockets import RawSocket, dial, end_of, errors_in, secrets_in, server_frame, shake_hands


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture
def proxy(echoing_proxy: LiveProxy) -> LiveProxy:
    return echoing_proxy


# Ends


async def test_code_and_reason_of_the_client_reach_the_upstream(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async with dial(proxy) as client:
        await client.close(4321, "cl")
    assert await upstream.next_close() == (4321, "cl")


@pytest.mark.parametrize(
    ("code", "reason"), [(4000, "up"), (1000, ""), (1001, "bye"), (1013, "late"), (3000, "é" * 60)]
)
async def test_code_and_reason_of_the_upstream_reach_the_client(
    proxy: LiveProxy, upstream: RealtimeUpstream, code: int, reason: str
) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send("last words")
        await websocket.close(code, reason)

    upstream.play(script)
    async with dial(proxy) as client:
        assert await client.recv() == "last words"
        assert await end_of(client) == (code, reason)
    assert await upstream.next_close() == (code, reason)


async def test_a_close_without_a_code_stays_one_upwards(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.CLOSE)
        assert client.next_frame() == (Opcode.CLOSE, b"")
    assert await upstream.next_close() == (1005, "")


async def test_a_close_without_a_code_stays_one_downwards(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await exchange.send(server_frame(Opcode.CLOSE, b""))
        await exchange.wait_until_client_leaves()

    wire.script = script
    with RawSocket(bare_proxy) as client:
        assert client.opened().next_frame() == (Opcode.CLOSE, b"")


async def test_last_messages_of_a_client_arrive_before_its_close(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    got: list[int] = []

    async def script(websocket: ServerConnection) -> None:
        async for message in websocket:
            got.append(len(message))

    upstream.play(script)
    with RawSocket(proxy) as client:
        client.opened()
        for _ in range(8):
            client.frame(Opcode.BINARY, b"x" * 3 * MIB)
        client.frame(Opcode.CLOSE, Close(4001, "").serialize())
        assert client.next_frame()[0] is Opcode.CLOSE
    assert (await upstream.next_close())[0] == 4001
    assert got == [3 * MIB] * 8


async def test_an_upstream_that_breaks_off_is_a_1011(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send("before")
        await websocket.recv()
        websocket.transport.abort()

    upstream.play(script)
    async with dial(proxy) as client:
        assert await client.recv() == "before"
        await client.send("now")
        assert await end_of(client) == (1011, "upstream: connection lost")


@pytest.mark.parametrize("leave", ["reset", "close"])
async def test_a_client_that_breaks_off_closes_the_upstream_soon(
    proxy: LiveProxy, upstream: RealtimeUpstream, leave: str
) -> None:
    client = RawSocket(proxy).opened()
    left_at = time.monotonic()
    client.reset() if leave == "reset" else client.socket.close()
    assert await upstream.next_close() == (1001, "")
    assert time.monotonic() - left_at < LEFT_WITHIN_S


async def test_a_client_that_breaks_off_cuts_an_upstream_that_does_not_answer(
    bare_proxy: LiveProxy, wire: FakeUpstream
) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        wire.signals.put("open")
        while await exchange.reader.read(65536):
            pass
        wire.signals.put("closed")

    wire.script = script
    client = RawSocket(bare_proxy).opened()
    await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)
    left_at = time.monotonic()
    client.reset()
    assert await asyncio.to_thread(wire.signals.get, True, PATIENCE_S) == "closed"
    assert time.monotonic() - left_at < LEFT_WITHIN_S


# The server stops


async def test_a_session_that_does_not_end_in_time_is_closed_with_1012_and_the_upstream_too(
    upstream: RealtimeUpstream,
) -> None:
    graceful_s = 2
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS=str(graceful_s)) as stopping:
        async with dial(stopping) as client:
            await client.send("x")
            await client.recv()
            began_at = time.monotonic()
            stop = asyncio.create_task(asyncio.to_thread(stopping.stop, signal.SIGTERM))
            assert (await end_of(client))[0] == 1012
            assert time.monotonic() - began_at < graceful_s + LEFT_WITHIN_S
            assert await upstream.next_close() == (1001, "")
            assert await stop == 0


async def test_a_session_goes_on_over_a_reload(upstream: RealtimeUpstream) -> None:
    # Longer than a busy machine may take to start the new worker.
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="300") as proxy:
        assert proxy.process is not None
        async with dial(proxy) as client:
            await client.send("before")
            assert await client.recv() == "before"
            old = proxy.worker_pids
            proxy.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(PATIENCE_S):
                while "Shutting down" not in proxy.log:  # noqa: ASYNC110 - what another process does
                    await asyncio.sleep(0.05)
            await client.send("after")
            assert await client.recv() == "after"
            assert set(old) & set(proxy.worker_pids)
        async with asyncio.timeout(PATIENCE_S):
            while set(old) & set(proxy.worker_pids):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


# Logs


async def test_no_key_path_or_message_is_logged(proxy: LiveProxy) -> None:
    """The proxy under test logs at DEBUG; uvicorn and websockets would write all of this."""
    assert "DEBUG" in proxy.log
    assert not secrets_in(proxy.log)


async def test_nothing_ordinary_is_logged_as_an_error(proxy: LiveProxy, bare_proxy: LiveProxy) -> None:
    """Runs last, over everything that this module has made the two proxies do."""
    assert not errors_in(proxy.log)
    assert not errors_in(bare_proxy.log)
