"""Messages of a WebSocket through the live proxy: whole, in order, in bounded memory, and in no log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response
from websockets.typing import Subprotocol

from gateway.tests.calls import PATIENCE_S
from gateway.tests.fake_realtime import MIB, RealtimeUpstream
from gateway.tests.fake_upstream import Gate
from gateway.tests.live import LiveProxy
from gateway.tests.sockets import BODY, KEY, LIMIT, RawSocket, dial, end_of, errors_in, refusal, settled


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture
def proxy(echoing_proxy: LiveProxy) -> LiveProxy:
    return echoing_proxy


# Messages


@pytest.mark.parametrize(
    "message",
    ["hello", "", b"", "ünï 语 \U0001f600", b"\x00\xff" * 500, "x" * 125, "x" * 126, "y" * 65536, b"z" * 70_000],
    ids=lambda message: f"{type(message).__name__}-{len(message)}",
)
async def test_messages_pass_both_ways(proxy: LiveProxy, upstream: RealtimeUpstream, message: str | bytes) -> None:
    async with dial(proxy) as client:
        await client.send(message)
        received = await client.recv()
    assert received == message
    assert type(received) is type(message)


async def test_ten_thousand_messages_keep_their_order(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async with dial(proxy) as client:

        async def send_all() -> None:
            for number in range(10_000):
                await client.send(str(number) if number % 2 else str(number).encode())

        sending = asyncio.create_task(send_all())
        received = [await client.recv() for _ in range(10_000)]
        await sending
    assert received == [str(number) if number % 2 else str(number).encode() for number in range(10_000)]


async def test_fragments_arrive_as_one_message(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        assert await websocket.recv() == "ab\u00e9"
        await websocket.send([b"\xc3", b"", b"\xa9"], text=True)

    upstream.play(script)
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.TEXT, b"a", fin=False)
        for _ in range(5000):
            client.frame(Opcode.CONT, b"", fin=False)
        client.frame(Opcode.PING, b"between")
        client.frame(Opcode.CONT, b"b\xc3", fin=False)
        client.frame(Opcode.CONT, b"\xa9")
        assert client.next_frame() == (Opcode.PONG, b"between")
        assert client.next_frame() == (Opcode.TEXT, b"\xc3\xa9")


@pytest.mark.parametrize("make", [lambda size: "t" * size, lambda size: b"b" * size], ids=["text", "binary"])
async def test_sixteen_mib_pass_both_ways(
    proxy: LiveProxy, upstream: RealtimeUpstream, make: Callable[[int], str | bytes]
) -> None:
    async with dial(proxy) as client:
        await client.send(make(LIMIT))
        assert await client.recv() == make(LIMIT)


async def test_a_larger_message_of_the_client_closes_with_1009(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    client = await dial(proxy)
    with contextlib.suppress(ConnectionClosed):
        await client.send(b"b" * (LIMIT + 1))
    assert (await end_of(client))[0] == 1009
    assert (await upstream.next_close())[0] == 1001


async def test_the_1009_is_there_for_a_client_that_sends_to_its_end_first(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        await asyncio.to_thread(client.frame, Opcode.BINARY, b"b" * (LIMIT + 1))
        client.frame(Opcode.TEXT, b"and more")
        opcode, data = client.next_frame()
    assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1009)


async def test_fragments_that_add_up_to_more_close_with_1009(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    client = await dial(proxy)
    with contextlib.suppress(ConnectionClosed):
        await client.send([b"b" * MIB] * 17)
    assert (await end_of(client))[0] == 1009
    assert (await upstream.next_close())[0] == 1001


async def test_a_larger_message_of_the_upstream_closes_with_1009(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send("before")
        await websocket.send(b"b" * (LIMIT + 1))

    upstream.play(script)
    async with dial(proxy) as client:
        assert await client.recv() == "before"
        code, reason = await end_of(client)
    assert code == 1011
    assert reason is not None
    assert reason.startswith("upstream: ")
    assert (await upstream.next_close())[0] == 1009


async def test_text_of_the_client_that_is_not_utf8_closes_with_1007(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.TEXT, b"before")
        assert client.next_frame() == (Opcode.TEXT, b"before")
        client.frame(Opcode.TEXT, b"\xff\xfe")
        opcode, data = client.next_frame()
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1007)
    assert (await upstream.next_close())[0] == 1001


@pytest.mark.parametrize("closes_at_once", [False, True])
async def test_text_of_the_upstream_that_is_not_utf8_closes_with_1007(
    proxy: LiveProxy, upstream: RealtimeUpstream, closes_at_once: bool
) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send(b"\xff\xfe", text=True)
        if not closes_at_once:
            await websocket.wait_closed()

    upstream.play(script)
    async with dial(proxy) as client:
        assert (await end_of(client))[0] == 1011
    assert (await upstream.next_close())[0] in ({1000, 1007} if closes_at_once else {1007})


@pytest.mark.parametrize(
    "frame", [b"\x83\x80abcd", b"\xf1\x80abcd", b"\x81\x01a", b"\x89\xfe\x00\x7eabcd" + b"p" * 126]
)
async def test_a_frame_against_the_protocol_closes_with_1002(
    proxy: LiveProxy, upstream: RealtimeUpstream, frame: bytes
) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        client.send(frame)
        opcode, data = client.next_frame()
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1002)
    assert (await upstream.next_close())[0] == 1001


async def test_each_side_is_answered_while_all_is_quiet(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await (await websocket.ping(b"from above"))
        upstream.signals.put("ponged")
        await websocket.wait_closed()

    upstream.play(script)
    async with dial(proxy) as client:
        assert await upstream.next_signal() == "ponged"
        async with asyncio.timeout(PATIENCE_S):
            await (await client.ping(b"from below"))


# Backpressure


async def test_a_client_that_does_not_read_holds_the_upstream_up(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    pushed = 0

    async def script(websocket: ServerConnection) -> None:
        nonlocal pushed
        for number in range(200):
            await websocket.send(bytes([number]) * MIB)
            pushed += 1

    upstream.play(script)
    idle_bytes = proxy.worker_rss_bytes()
    async with dial(proxy, max_queue=1) as client:
        at_rest = await settled(lambda: pushed)
        assert at_rest < 60  # what the kernel's buffers and one message in each pair of hands can hold
        assert proxy.worker_rss_bytes() - idle_bytes < 20 * MIB
        received = [await client.recv() for _ in range(200)]
    assert [message[0] for message in received] == list(range(200))
    assert {len(message) for message in received} == {MIB}


async def test_an_upstream_that_does_not_read_holds_the_client_up(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    gate = Gate()

    async def script(websocket: ServerConnection) -> None:
        await gate.wait()
        for number in range(200):
            message = await websocket.recv()
            assert (len(message), message[0]) == (MIB, number)
        await websocket.send("all")

    upstream.play(script)
    pushed = 0
    idle_bytes = proxy.worker_rss_bytes()
    async with dial(proxy) as client:

        async def push() -> None:
            nonlocal pushed
            for number in range(200):
                await client.send(bytes([number]) * MIB)
                pushed += 1

        pushing = asyncio.create_task(push())
        at_rest = await settled(lambda: pushed)
        assert at_rest < 60
        assert proxy.worker_rss_bytes() - idle_bytes < 20 * MIB
        gate.open()
        assert await client.recv() == "all"
        await pushing


async def test_pings_without_end_cost_a_client_that_does_not_read_nothing(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    idle_bytes = proxy.worker_rss_bytes()
    pings = Frame(Opcode.PING, b"p" * 125).serialize(mask=True) * 8000

    def flood() -> None:
        for _ in range(30):
            client.send(pings)

    def read_on() -> None:
        while client.next_frame() != (Opcode.PONG, b"the last"):
            pass

    with RawSocket(proxy) as client:
        client.opened()
        await asyncio.to_thread(flood)
        client.frame(Opcode.PING, b"the last")
        assert proxy.worker_rss_bytes() - idle_bytes < 10 * MIB
        await asyncio.to_thread(read_on)


async def test_a_pong_that_is_owed_to_a_client_that_is_turned_out_is_owed_no_more(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    sent, heard = 0, Gate()

    async def script(websocket: ServerConnection) -> None:
        async def flood() -> None:
            nonlocal sent
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await websocket.send(b"x" * MIB)
                    sent += 1

        await websocket.recv()
        flooding = asyncio.create_task(flood())
        await websocket.recv()
        heard.open()
        await flooding

    upstream.play(script)
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.TEXT, b"go on")
        await settled(lambda: sent)
        client.frame(Opcode.PING, b"still there?")
        client.frame(Opcode.TEXT, b"the ping was heard")
        await heard.wait()
        client.send(b"\xff\xff")  # no frame
        await asyncio.to_thread(client.read_to_end)
    assert "resume_writing() failed" not in proxy.log


# Logs


async def test_no_key_path_or_message_is_logged(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    """The proxy under test logs at DEBUG; uvicorn and websockets would write all of this."""
    headers = {"Authorization": f"Bearer {KEY}"}
    offers = [Subprotocol(f"openai-insecure-api-key.{KEY}")]
    async with dial(proxy, f"/v1/realtime?key={KEY}", additional_headers=headers, subprotocols=offers) as client:
        await client.send(BODY)
        assert await client.recv() == BODY
        await client.close(4000, BODY)
    await refusal(proxy, f"/nothing?key={KEY}")
    upstream.refuse = lambda request: Response(401, "No", Headers([("Content-Length", str(len(BODY)))]), BODY.encode())
    await refusal(proxy, f"/v1/realtime?key={KEY}", additional_headers=headers)
    log = proxy.log
    assert "DEBUG" in log
    for secret in (KEY, BODY, "/v1/realtime", "/nothing"):
        assert secret not in log


async def test_nothing_ordinary_is_logged_as_an_error(proxy: LiveProxy) -> None:
    """Runs last, over everything that this module has made the proxy do."""
    assert not errors_in(proxy.log)
