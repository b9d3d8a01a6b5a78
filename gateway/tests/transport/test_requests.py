"""What the relay expects of a transport: the way up, also of a body whose answer comes before its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2 as httpx
import pytest

from gateway.tests.calls import (
    CHUNKED,
    LEFT_WITHIN_S,
    LENGTH_OF_A_GIGABYTE,
    PATIENCE_S,
    call,
    endless,
    fetch,
    read,
    signal_from,
)
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, reset


class TestTheWayUp:
    @pytest.mark.parametrize(
        "target",
        [b"/v1/%2F%41/..", b'/v1/a"b', b"/v1/[1]?a=[1]&a=2", b"/v1/a+b;c?d+e;f=%zz", b"/v1//x/?", b"*"],
    )
    async def test_the_target_goes_out_as_given(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, target: bytes
    ) -> None:
        await fetch(transport, upstream, target)
        assert upstream.requests[0].target.encode() == target

    async def test_header_case_order_and_duplicates_stay(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        fields = [(b"X-oNe", b"1"), (b"b", b"2"), (b"x-one", b""), (b"X-oNe", b"\xe4 3")]
        await fetch(transport, upstream, fields=fields)
        got = [(name.encode(), value.encode("latin-1")) for name, value in upstream.requests[0].headers]
        assert got == [(b"Host", b"api.example"), *fields]

    async def test_an_unknown_method_goes_out_as_given(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        await fetch(transport, upstream, method="purGe")
        assert upstream.requests[0].method == "purGe"

    @pytest.mark.parametrize("size", [0, 5, 3_000_000])
    async def test_a_known_body_arrives(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, size: int
    ) -> None:
        body = b"ab" * (size // 2)
        status, _ = await fetch(transport, upstream, method="POST", body=body)
        assert (status, bytes(upstream.requests[0].body)) == (200, body)

    @pytest.mark.parametrize("framing", [(b"Content-Length", b"600000"), CHUNKED])
    async def test_a_streamed_body_arrives_and_the_connection_is_kept(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, framing: tuple[bytes, bytes]
    ) -> None:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(6):
                yield b"y" * 100_000
                yield b""

        for _ in range(2):
            await fetch(transport, upstream, method="POST", fields=[framing], body=parts())
        assert [len(request.body) for request in upstream.requests] == [600_000, 600_000]
        assert all(request.complete for request in upstream.requests)
        assert upstream.connections_opened == 1

    async def test_a_streamed_body_leaves_as_it_comes(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        first_arrived = Gate()

        async def script(exchange: Exchange) -> None:
            while bytes(exchange.request.body) != b"first":
                await exchange.read_some_body()
            first_arrived.open()
            await exchange.read_body()
            await exchange.answer()

        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await first_arrived.wait()
            yield b"second"

        upstream.script = script
        await fetch(transport, upstream, method="POST", fields=[CHUNKED], body=parts())
        assert bytes(upstream.requests[0].body) == b"firstsecond"

    async def test_an_upload_waits_for_a_slow_upstream(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        produced = 0

        async def parts() -> AsyncIterator[bytes]:
            nonlocal produced
            async for part in endless():
                produced += len(part)
                yield part

        async def script(exchange: Exchange) -> None:
            await stalled.wait()
            reset(exchange)

        stalled = Gate()
        upstream.script = script
        with pytest.raises(httpx.WriteTimeout):
            await call(
                transport,
                upstream,
                method="POST",
                fields=[LENGTH_OF_A_GIGABYTE],
                body=parts(),
                timeouts={"write": 0.3},
            )
        stalled.open()
        assert produced < 24 << 20  # what two sockets on one machine may hold

    @pytest.mark.parametrize("after_head", [False, True])
    async def test_an_error_of_the_callers_stream_reaches_the_caller_and_the_upstream(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, after_head: bool
    ) -> None:
        head_received = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b"x"
            if after_head:
                await head_received.wait()
            raise ZeroDivisionError

        async def script(exchange: Exchange) -> None:
            if after_head:
                await exchange.start_stream()
            left_after_s = await exchange.wait_until_client_leaves()
            await exchange.close()
            upstream.signals.put(left_after_s)

        async def run() -> None:
            response = await call(ours, upstream, method="POST", fields=[CHUNKED], body=parts())
            head_received.set()
            await read(response)

        upstream.script = script
        with pytest.raises(ZeroDivisionError):
            await run()
        assert await signal_from(upstream) < LEFT_WITHIN_S

    @pytest.mark.parametrize("announced", [b"3", b"5"])
    async def test_a_body_of_another_length_than_announced_is_refused(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, announced: bytes
    ) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b"four"

        for body in (b"four", parts()):
            with pytest.raises(httpx.LocalProtocolError):
                await call(ours, upstream, method="POST", fields=[(b"Content-Length", announced)], body=body)

    @pytest.mark.parametrize(
        ("name", "value"),
        [(b"x", b"a\r\nb: c"), (b"x", b"a\nb"), (b"x", b"a\rb"), (b"x", b"a\0b"), (b"x y", b""), (b"", b"")],
    )
    async def test_a_header_that_would_become_two_is_refused(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, name: bytes, value: bytes
    ) -> None:
        with pytest.raises(httpx.LocalProtocolError):
            await call(transport, upstream, fields=[(name, value)])
        assert upstream.requests == []

    @pytest.mark.parametrize(
        ("method", "target"),
        [("GET", b"/ HTTP/1.1\r\nx: y"), ("GET", b"/a b"), ("GET /", b"/"), ("G\r\n", b"/"), ("CONNECT", b"/")],
    )
    async def test_a_request_line_that_would_become_another_is_refused(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, method: str, target: bytes
    ) -> None:
        with pytest.raises(httpx.LocalProtocolError):
            await call(ours, upstream, target, method=method)

    @pytest.mark.parametrize(
        "fields",
        [
            [(b"Content-Length", b"2"), CHUNKED],
            [(b"Content-Length", b"2"), (b"content-length", b"2")],
            [CHUNKED, (b"transfer-encoding", b"chunked")],
            [(b"Content-Length", b"+2")],
            [(b"Content-Length", b"9" * 5000)],
            [(b"Transfer-Encoding", b"gzip")],
        ],
    )
    async def test_a_body_announced_in_two_ways_is_refused(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, fields: list[tuple[bytes, bytes]]
    ) -> None:
        with pytest.raises(httpx.LocalProtocolError):
            await call(ours, upstream, method="POST", fields=fields, body=b"ab")


class TestEarlyAnswers:
    async def test_an_answer_during_the_upload_arrives_exactly(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.read_some_body()
            await exchange.answer(b"too large", status="413 Content Too Large")
            await exchange.close()

        upstream.script = script
        for framing in [LENGTH_OF_A_GIGABYTE, CHUNKED] * 10:
            answer = await fetch(ours, upstream, method="POST", fields=[framing], body=endless())
            assert answer == (413, b"too large")

    async def test_it_does_not_wait_for_the_callers_next_part_and_ends_the_upload(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        stream_closed = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            try:
                yield b"x"
                await asyncio.Event().wait()
            finally:
                stream_closed.set()

        async def script(exchange: Exchange) -> None:
            await exchange.read_some_body()
            await exchange.answer(b"no", status="401 Unauthorized")
            left_after_s = await exchange.wait_until_client_leaves()
            await exchange.close()
            upstream.signals.put(left_after_s)

        upstream.script = script
        assert await fetch(ours, upstream, method="POST", fields=[CHUNKED], body=parts()) == (401, b"no")
        await asyncio.wait_for(stream_closed.wait(), PATIENCE_S)
        assert await signal_from(upstream) < LEFT_WITHIN_S

    async def test_the_upload_may_go_on_beside_the_answer(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        head_received = asyncio.Event()

        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            await head_received.wait()
            yield b"two"

        async def script(exchange: Exchange) -> None:
            await exchange.start_stream()
            await exchange.chunk(await exchange.read_body())
            await exchange.end_stream()

        upstream.script = script
        response = await call(ours, upstream, method="POST", fields=[CHUNKED], body=parts())
        head_received.set()
        assert await read(response) == b"onetwo"
        await fetch(ours, upstream)
        assert upstream.connections_opened == 2
