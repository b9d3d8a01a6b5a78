"""Our transport's own promises: any split of the bytes, bounded memory, no needless wait, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2 as httpx
import pytest
import trustme
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.answer import Answer, Interim
from gateway.connection import Connection
from gateway.tests.calls import LEFT_WITHIN_S, call, fetch, read, request_to, signal_from, until
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tls import ReadBuffer, TlsTransport
from gateway.transport import PooledTransport, tls_context

CHUNKED = (b"Transfer-Encoding", b"chunked")
ANSWERS = [
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 Fine so far\r\nA: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5;x=y\r\nhello\r\n1\r\n \r\nb\r\nworld\xff\x00\r\n!!\r\n0\r\nX-Sum: 42\r\nb: 2\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 11\r\nx-a:\r\nX-A: b\r\n\r\nhello world",
    b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nuntil the end",
    b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
]


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server
    assert server.failures == []


@pytest.fixture
async def transport() -> AsyncIterator[PooledTransport]:
    transport = PooledTransport()
    yield transport
    await transport.aclose()


async def test_the_event_loop_is_the_one_asked_for(request: pytest.FixtureRequest) -> None:
    wanted = request.node.callspec.params["event_loop_policy"]
    assert type(asyncio.get_running_loop()).__module__.split(".")[0] == wanted


# Bytes

Outcome = tuple[int, bytes, list[Any], bytes, list[Any], str]


async def fed(pieces: list[bytes]) -> Outcome:
    """Hand the pieces to a connection one by one, as an event loop does, then the end of the connection."""
    ours, theirs = socket.socketpair()
    kept: list[Connection] = []
    connection = Connection(
        ("http", "x", 80), buffer=ReadBuffer(), on_free=kept.append, on_lost=lambda connection: None
    )
    await connection.loop.create_connection(lambda: connection, sock=ours)
    answer = connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"", bodyless=False, read_timeout_s=None)
    for piece in pieces:
        if answer.ended:
            break
        connection.get_buffer(-1)[: len(piece)] = piece
        connection.buffer_updated(len(piece))
    theirs.shutdown(socket.SHUT_WR)
    try:
        await answer.head()
        body = b"".join([chunk async for chunk in answer])
        problem = ""
    except httpx.TransportError as exc:
        body, problem = b"", type(exc).__name__
    connection.abort()
    theirs.close()
    fields = answer.fields if answer.status else []
    return answer.status, answer.reason, fields, body, answer.trailers, problem


def split(data: bytes, at: list[int]) -> list[bytes]:
    borders = sorted({border % len(data) for border in at} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(borders)]


@settings(max_examples=60, deadline=None)
@given(data=st.sampled_from(ANSWERS), at=st.lists(st.integers(0, 400), max_size=12))
def test_where_the_network_splits_an_answer_does_not_matter(data: bytes, at: list[int]) -> None:
    whole = asyncio.run(fed([data]))
    assert whole[-1] == ""
    assert asyncio.run(fed(split(data, at))) == whole


@pytest.mark.parametrize("data", ANSWERS)
def test_an_answer_may_come_byte_by_byte(data: bytes) -> None:
    assert asyncio.run(fed([data[i : i + 1] for i in range(len(data))])) == asyncio.run(fed([data]))


@settings(max_examples=80, deadline=None)
@given(
    data=st.sampled_from(ANSWERS),
    position=st.integers(0, 400),
    garbage=st.binary(min_size=1, max_size=20),
    at=st.lists(st.integers(0, 400), max_size=4),
)
def test_garbage_is_an_answer_or_an_error_and_nothing_else(
    data: bytes, position: int, garbage: bytes, at: list[int]
) -> None:
    position %= len(data)
    spoiled = data[:position] + garbage + data[position + len(garbage) :]
    problem = asyncio.run(fed(split(spoiled, at)))[-1]
    assert problem in {"", "RemoteProtocolError"}


# Waiting and memory


async def test_a_body_that_came_with_its_head_needs_no_turn_of_the_loop(
    transport: PooledTransport, upstream: FakeUpstream
) -> None:
    response = await call(transport, upstream)
    assert isinstance(response.stream, Answer)
    await until(lambda: response.stream.ended)
    step = response.stream.__anext__()
    with pytest.raises(StopIteration) as chunk:
        step.send(None)  # type: ignore[attr-defined]
    assert chunk.value.value.startswith(b"{")
    end = response.stream.__anext__()
    with pytest.raises(StopAsyncIteration):
        end.send(None)  # type: ignore[attr-defined]


async def test_a_piece_is_taken_in_the_turn_in_which_it_arrives_unless_it_would_overtake() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(("http", "x", 80), buffer=ReadBuffer(), on_free=lambda _: None, on_lost=lambda _: None)
    await connection.loop.create_connection(lambda: connection, sock=ours)
    answer = connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"", bodyless=False, read_timeout_s=None)
    taken: list[bytes] = []
    waited_for: list[bytes] = []
    takes = True

    def take(piece: bytes) -> bool:
        if takes:
            taken.append(piece)
        return takes

    async def read_all() -> None:
        waited_for.extend([piece async for piece in answer])

    def arrive(data: bytes) -> None:
        connection.get_buffer(-1)[: len(data)] = data
        connection.buffer_updated(len(data))

    answer.on_piece = take
    arrive(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    assert taken == []  # nobody waits yet: the reader has its own way to begin
    reader = asyncio.create_task(read_all())
    await until(lambda: bool(answer._waiter))
    arrive(b"1\r\nb\r\n")
    assert taken == [b"b"]
    takes = False
    arrive(b"1\r\nc\r\n")
    takes = True
    arrive(b"1\r\nd\r\n")
    assert taken == [b"b"]
    await until(lambda: bool(answer._waiter))
    arrive(b"1\r\ne\r\n0\r\n\r\n")
    assert taken == [b"b", b"e"]
    await reader
    assert waited_for == [b"a", b"cd"]
    theirs.close()


async def test_an_answer_is_told_of_once_in_the_turn_in_which_its_head_came_or_will_not_come() -> None:
    told: list[bool | int] = []

    class Told:
        answer: Answer

        def take_interim(self, interim: Interim) -> None:
            told.append(interim.status)

        def arrived(self) -> None:
            told.append(self.answer.is_whole)

    async def told_of(*pieces: bytes) -> list[bool | int]:
        ours, theirs = socket.socketpair()
        connection = Connection(("http", "x", 80), buffer=ReadBuffer(), on_free=lambda _: None, on_lost=lambda _: None)
        await connection.loop.create_connection(lambda: connection, sock=ours)
        reader = Told()
        reader.answer = answer = connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"", bodyless=False, read_timeout_s=None)
        told.clear()
        answer.reader = reader
        for piece in pieces:
            connection.get_buffer(-1)[: len(piece)] = piece
            connection.buffer_updated(len(piece))
        theirs.close()
        return list(told)

    head, body = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"ok"
    assert await told_of(head + body) == [True]
    assert await told_of(head, body) == [False]
    assert await told_of(head[:20]) == []
    assert await told_of(b"HTTP/1.1 100 Continue\r\n\r\n") == []
    assert await told_of(b"HTTP/1.1 103 Early Hints\r\n\r\n") == [103]
    assert await told_of(b"HTTP/1.1 103 Early Hints\r\n\r\n" + head + body) == [103, True]
    assert await told_of(b"this is not HTTP\r\n\r\n") == [False]


async def test_a_connection_is_free_before_its_answer_is_read(
    transport: PooledTransport, upstream: FakeUpstream
) -> None:
    first = await call(transport, upstream)
    await until(lambda: first.stream.ended)  # type: ignore[union-attr]
    second = await call(transport, upstream, b"/second")
    await until(lambda: second.stream.ended)  # type: ignore[union-attr]
    assert upstream.connections_opened == 1
    assert b'"/v1/models"' in await read(first)
    assert b'"/second"' in await read(second)


async def test_a_large_download_for_a_slow_reader_stays_small_in_memory(
    transport: PooledTransport, upstream: FakeUpstream
) -> None:
    part = b"10000\r\n" + b"x" * 65536 + b"\r\n"

    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        for _ in range(800):
            await exchange.send(part)
        await exchange.end_stream()

    upstream.script = script
    response = await call(transport, upstream)
    tracemalloc.start()
    try:
        received = 0
        async for chunk in response.stream:  # type: ignore[union-attr]
            received += len(chunk)
            for _ in range(5):
                await asyncio.sleep(0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received == 800 * 65536
    assert peak < 1_500_000  # of which the server, in this process too, holds some


# Keeping


async def test_no_more_than_the_limit_stay_idle(upstream: FakeUpstream) -> None:
    transport = PooledTransport(max_idle=2)
    await asyncio.gather(*(fetch(transport, upstream) for _ in range(6)))
    await until(lambda: upstream.open_connections == 2)
    await transport.aclose()
    await until(lambda: upstream.open_connections == 0)


async def test_what_is_idle_too_long_is_closed_and_the_last_used_is_used_first(
    upstream: FakeUpstream,
) -> None:
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        if exchange.request.target == "/held":
            await gate.wait()
        await exchange.answer()

    upstream.script = script
    transport = PooledTransport(idle_timeout_s=1.5)
    held = asyncio.create_task(fetch(transport, upstream, b"/held"))
    await until(lambda: len(upstream.requests) == 1)
    await fetch(transport, upstream)
    gate.open()
    await held
    await fetch(transport, upstream)
    assert upstream.requests[2].connection == upstream.requests[0].connection
    await until(lambda: upstream.open_connections == 0)
    await fetch(transport, upstream)
    assert upstream.connections_opened == 3
    await transport.aclose()


async def test_closing_the_transport_ends_what_is_open_and_refuses_more(upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.wait_until_client_leaves()
        await exchange.close()
        upstream.signals.put("left")

    upstream.script = script
    transport = PooledTransport()
    response = await call(transport, upstream)
    await transport.aclose()
    assert await signal_from(upstream, within_s=LEFT_WITHIN_S) == "left"
    with pytest.raises(httpx.ReadError):
        await read(response)
    with pytest.raises(RuntimeError):
        await call(transport, upstream)


async def test_every_address_of_a_name_is_tried(transport: PooledTransport, upstream: FakeUpstream) -> None:
    response = await transport.handle_async_request(request_to(f"http://localhost:{upstream.port}"))
    assert response.status_code == 200
    await read(response)


@pytest.mark.parametrize("is_tls", [False, True])
async def test_nothing_is_left_behind(is_tls: bool) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0)

    async def early(exchange: Exchange) -> None:
        await exchange.read_some_body()
        await exchange.answer(status="413 Content Too Large")
        exchange.abort()

    async def cut(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        await exchange.close()

    async def use(upstream: FakeUpstream, trusting: ssl.SSLContext) -> None:
        with pytest.raises(httpx.ConnectError):
            await fetch(PooledTransport(ssl_context=strict), stranger)
        transport = PooledTransport(ssl_context=trusting)
        await fetch(transport, upstream)
        upstream.script = early
        await fetch(transport, upstream, method="POST", fields=[CHUNKED], body=endless())
        upstream.script = cut
        with pytest.raises(httpx.RemoteProtocolError):
            await fetch(transport, upstream)
        await (await call(transport, upstream)).aclose()
        await transport.aclose()
        await until(lambda: upstream.open_connections == 0)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    authority = trustme.CA()
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trusting, strict = tls_context(extra_ca_file=None), tls_context(extra_ca_file=None)
    authority.issue_cert("127.0.0.1").configure_cert(server_tls)
    authority.configure_trust(trusting)
    gc.collect()
    gc.disable()
    try:
        with FakeUpstream(tls=server_tls if is_tls else None) as upstream, FakeUpstream(tls=server_tls) as stranger:
            await use(upstream, trusting)
            assert upstream.failures == []
        kinds = (Connection, Answer, TlsTransport)
        assert [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)] == []
    finally:
        gc.enable()
