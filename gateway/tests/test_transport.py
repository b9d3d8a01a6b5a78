"""What the relay expects of a transport: httpx's own and ours, on real sockets, ours on both event loops."""

from __future__ import annotations

import asyncio
import gzip
import json
import queue
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
import trustme
import uvloop

from gateway.outgoing import OutgoingRequest
from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S, call, fetch, read, request_to, signal_from, until
from gateway.tests.egress_proxies import ConnectProxy, EgressProxy, Socks5Proxy
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.transport import PooledTransport, tls_context

MakeTransport = Callable[..., httpx.AsyncBaseTransport]
LENGTH_OF_A_GIGABYTE = (b"Content-Length", b"1073741824")
CHUNKED = (b"Transfer-Encoding", b"chunked")


@pytest.fixture(params=["httpx", "own", "own-uvloop"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def event_loop_policy(flavour: str) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if flavour == "own-uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
async def make_transport(flavour: str) -> AsyncIterator[MakeTransport]:
    made: list[httpx.AsyncBaseTransport] = []

    def make(*, extra_ca_file: str | None = None, proxy_url: str | None = None) -> httpx.AsyncBaseTransport:
        context = tls_context(extra_ca_file=extra_ca_file)
        transport: httpx.AsyncBaseTransport
        if flavour == "httpx":
            transport = httpx.AsyncHTTPTransport(verify=context, proxy=proxy_url)
        else:
            transport = PooledTransport(ssl_context=context, proxy_url=proxy_url)
        made.append(transport)
        return transport

    yield make
    for transport in made:
        await transport.aclose()


@pytest.fixture
def transport(make_transport: MakeTransport) -> httpx.AsyncBaseTransport:
    return make_transport()


@pytest.fixture
def ours(flavour: str, transport: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
    if flavour == "httpx":
        pytest.skip("httpx does otherwise here")
    return transport


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Any) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server
    assert server.failures == []


def raw_answer(data: bytes, *, close: bool = False) -> Callable[[Exchange], Awaitable[None]]:
    """A script that reads the request and answers with these bytes."""

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(data)
        if close:
            await exchange.close()

    return script


def reset(exchange: Exchange) -> None:
    """Drop the line so that the peer, unless it has left already, sees a reset, not an end of file."""
    sock = exchange.writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.abort()


async def endless(part: bytes = b"x" * 65536) -> AsyncIterator[bytes]:
    while True:
        yield part


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


class TestTheWayDown:
    async def test_status_reason_and_headers_come_as_sent(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        upstream.script = raw_answer(
            b"HTTP/1.1 299 So So\r\nX-A: 1\r\nx-b: \xe4\r\nX-A: 2\r\nX-empty:\r\nContent-Length: 2\r\n\r\nok"
        )
        response = await call(transport, upstream)
        assert response.status_code == 299
        assert response.extensions["reason_phrase"] == b"So So"
        assert response.extensions["http_version"] == b"HTTP/1.1"
        assert response.headers.raw == [
            (b"X-A", b"1"),
            (b"x-b", b"\xe4"),
            (b"X-A", b"2"),
            (b"X-empty", b""),
            (b"Content-Length", b"2"),
        ]
        assert await read(response) == b"ok"

    async def test_our_response_offers_the_raw_headers_directly(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        response = await call(ours, upstream)
        assert response.extensions["raw_headers"] == response.headers.raw
        assert response.headers["Content-Type"] == "application/json"
        await response.aclose()

    async def test_ours_tells_when_the_request_is_on_its_way(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        sent = Gate()

        async def script(exchange: Exchange) -> None:
            await sent.wait()
            await exchange.answer(await exchange.read_body())

        upstream.script = script
        told: list[str] = []

        def on_sent() -> None:
            told.append("sent")
            sent.open()

        request = OutgoingRequest(
            "POST",
            httpx.URL(upstream.url),
            fields=[(b"host", b"h"), (b"content-length", b"5")],
            length=5,
            body=b"hello",
            target=b"/v1/x",
            timeout={},
            on_sent=on_sent,
        )
        assert request.headers["content-length"] == "5"
        assert [part async for part in request.stream] == [b"hello"]
        response = await ours.handle_async_request(request)
        assert (await read(response), told) == (b"hello", ["sent"])
        assert request.body == b""  # what goes out once is not held until the answer's end

    async def test_an_encoded_body_is_not_decoded(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        packed = gzip.compress(b"hello" * 100)

        async def script(exchange: Exchange) -> None:
            await exchange.answer(packed, headers=(("content-encoding", "gzip"),))

        upstream.script = script
        assert (await fetch(transport, upstream))[1] == packed

    async def test_an_event_arrives_before_the_next_is_sent(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        gates = [Gate(), Gate()]

        async def script(exchange: Exchange) -> None:
            await exchange.start_stream()
            for number, gate in enumerate(gates):
                await exchange.events({"n": number}, done=False)
                await gate.wait()
            await exchange.end_stream()

        upstream.script = script
        response = await call(transport, upstream)
        chunks = aiter(response.stream)  # type: ignore[arg-type]
        for number, gate in enumerate(gates):
            assert await anext(chunks) == b'data: {"n": %d}\n\n' % number
            gate.open()
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)

    async def test_interim_answers_are_skipped(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        upstream.script = raw_answer(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
            b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        )
        response = await call(transport, upstream)
        assert (response.status_code, response.headers.raw) == (200, [(b"Content-Length", b"2")])
        assert await read(response) == b"ok"

    @pytest.mark.parametrize(
        ("method", "status", "length"),
        [("HEAD", b"200 OK", b"12"), ("HEAD", b"200 OK", b"0"), ("GET", b"304 Not Modified", b"12")],
    )
    async def test_an_answer_without_a_body_ends_at_its_head(
        self,
        transport: httpx.AsyncBaseTransport,
        upstream: FakeUpstream,
        method: str,
        status: bytes,
        length: bytes,
    ) -> None:
        upstream.script = raw_answer(b"HTTP/1.1 %b\r\nContent-Length: %b\r\n\r\n" % (status, length))
        for _ in range(2):
            response = await call(transport, upstream, method=method)
            assert (response.headers["content-length"].encode(), await read(response)) == (length, b"")
        assert upstream.connections_opened == 1

    async def test_a_204_has_no_body(self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream) -> None:
        upstream.script = raw_answer(b"HTTP/1.1 204 No Content\r\n\r\n")
        for _ in range(2):
            assert await fetch(transport, upstream, method="DELETE") == (204, b"")
        assert upstream.connections_opened == 1

    @pytest.mark.parametrize("version", [b"1.1", b"1.0"])
    async def test_a_body_without_a_length_ends_with_the_connection(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, version: bytes
    ) -> None:
        upstream.script = raw_answer(b"HTTP/%b 200 OK\r\n\r\nall of it" % version, close=True)
        response = await call(transport, upstream)
        assert response.extensions["http_version"] == b"HTTP/" + version
        assert await read(response) == b"all of it"

    async def test_trailers_are_offered(self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream) -> None:
        upstream.script = raw_answer(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
            b"2;ext=1\r\nok\r\n0\r\nX-Sum: 42\r\nx-more: 1\r\n\r\n"
        )
        for _ in range(2):
            response = await call(ours, upstream)
            assert await read(response) == b"ok"
            assert response.stream.trailers == [(b"X-Sum", b"42"), (b"x-more", b"1")]  # type: ignore[union-attr]
        assert upstream.connections_opened == 1

    async def test_a_head_of_60_kilobytes_passes(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        lines = b"".join(b"X-%d: %b\r\n" % (number, b"v" * 1000) for number in range(60))
        upstream.script = raw_answer(b"HTTP/1.1 200 OK\r\n%bContent-Length: 0\r\n\r\n" % lines)
        response = await call(transport, upstream)
        assert len(response.headers["x-59"]) == 1000
        await response.aclose()

    async def test_a_download_waits_for_a_slow_reader(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.start_stream()
            sent = 0
            try:
                async with asyncio.timeout(0.5):
                    while sent < 64 << 20:
                        await exchange.chunk(b"x" * 65536)
                        sent += 65536
            except TimeoutError:
                pass
            upstream.signals.put(sent)
            await exchange.wait_until_client_leaves()

        upstream.script = script
        response = await call(transport, upstream)
        assert await signal_from(upstream) < 32 << 20  # what two sockets on one machine may hold
        await response.aclose()


class TestCutsAndGarbage:
    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
        ],
    )
    async def test_a_body_cut_short_raises_after_what_came(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, answer: bytes
    ) -> None:
        upstream.script = raw_answer(answer, close=True)
        response = await call(transport, upstream)
        came = []
        with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012 - what came before is asserted too
            async for chunk in response.stream:  # type: ignore[union-attr]
                came.append(chunk)
        await response.aclose()
        assert b"".join(came) == b"half"

    @pytest.mark.parametrize("head", [b"", b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"])
    @pytest.mark.parametrize("last", [b"", b"3\r\nabc\r\n"])
    async def test_a_reset_is_never_an_end(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, head: bytes, last: bytes
    ) -> None:
        gate = Gate()

        async def script(exchange: Exchange) -> None:
            await exchange.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n1\r\na\r\n")
            await gate.wait()
            await exchange.send(last)
            reset(exchange)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            upstream.signals.put("reset")

        upstream.script = script
        response = await call(transport, upstream)
        chunks = aiter(response.stream)  # type: ignore[arg-type]
        await anext(chunks)
        gate.open()
        # Blocks this loop on purpose: the last bytes and the reset are there together when it looks again.
        upstream.signals.get(timeout=PATIENCE_S)
        with pytest.raises(httpx.ReadError):
            async for _ in chunks:
                pass
        await response.aclose()

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1 20",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"<html>",
            b"\x16\x03\x01\x02",
            b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        ],
    )
    async def test_what_is_no_answer_raises(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, answer: bytes
    ) -> None:
        upstream.script = raw_answer(answer, close=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await call(transport, upstream)

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxyz",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"HTTP/1.1 001 Hm\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"v" * 600_000,
            b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
        ],
    )
    async def test_we_refuse_more(self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, answer: bytes) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.send(answer)
            left_after_s = await exchange.wait_until_client_leaves()
            await exchange.close()
            upstream.signals.put(left_after_s)

        upstream.script = script
        with pytest.raises(httpx.RemoteProtocolError):
            await call(ours, upstream)

    @pytest.mark.parametrize("last", [b"zz\r\n", b"0\r\nX: " + b"v" * 600_000, b"1;" + b"e" * 600_000])
    async def test_a_malformed_chunk_raises_after_what_came(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, last: bytes
    ) -> None:
        upstream.script = raw_answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n" + last)
        response = await call(ours, upstream)
        chunks = aiter(response.stream)  # type: ignore[arg-type]
        assert await anext(chunks) == b"half"
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(chunks)


class TestLeaving:
    async def test_closing_the_stream_reaches_the_upstream(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.start_stream()
            await exchange.chunk(b"one")
            upstream.signals.put("sent")
            await exchange.wait_until_client_leaves()
            upstream.signals.put("left")

        upstream.script = script
        response = await call(transport, upstream)
        await signal_from(upstream)
        await response.aclose()
        assert await signal_from(upstream, within_s=LEFT_WITHIN_S) == "left"

    @pytest.mark.parametrize("phase", ["head", "body", "upload"])
    async def test_cancelling_reaches_the_upstream(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, phase: str
    ) -> None:
        async def script(exchange: Exchange) -> None:
            if phase == "body":
                await exchange.start_stream()
            upstream.signals.put("here")
            await exchange.wait_until_client_leaves()
            upstream.signals.put("left")

        async def silent() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.Event().wait()

        async def run() -> None:
            body: Any = silent() if phase == "upload" else b""
            fields = [CHUNKED] if phase == "upload" else []
            await fetch(transport, upstream, method="POST", fields=fields, body=body)

        upstream.script = script
        task = asyncio.create_task(run())
        await signal_from(upstream)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await signal_from(upstream, within_s=LEFT_WITHIN_S) == "left"

    @pytest.mark.parametrize("timed_out", [False, True])
    async def test_leaving_during_the_tls_handshake_costs_nothing_later(
        self,
        flavour: str,
        make_transport: MakeTransport,
        ca_file: str,
        server_tls: ssl.SSLContext,
        timed_out: bool,
    ) -> None:
        hello = asyncio.Event()
        left = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not hello.is_set():
                await reader.read(65536)
                hello.set()
                while await reader.read(65536):
                    pass
                left.set()
            else:
                await writer.start_tls(server_tls)
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        transport = make_transport(extra_ca_file=ca_file)
        timeouts = {"connect": 1.0 if timed_out else None}
        task = asyncio.create_task(transport.handle_async_request(request_to(url, timeouts=timeouts)))
        await asyncio.wait_for(hello.wait(), PATIENCE_S)
        if timed_out:
            with pytest.raises(httpx.ConnectTimeout):
                await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        if flavour != "httpx" or timed_out:
            await asyncio.wait_for(left.wait(), LEFT_WITHIN_S)
        for _ in range(3):
            response = await transport.handle_async_request(request_to(url))
            assert await read(response) == b"ok"
        server.close()

    @pytest.mark.parametrize("phase", ["head", "body"])
    async def test_a_read_timeout_is_honoured(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, phase: str
    ) -> None:
        async def script(exchange: Exchange) -> None:
            if phase == "body":
                await exchange.start_stream()
                await exchange.chunk(b"one")
            await exchange.wait_until_client_leaves()

        upstream.script = script
        with pytest.raises(httpx.ReadTimeout):
            await fetch(transport, upstream, timeouts={"read": 0.1})

    async def test_nobody_there_is_a_connect_error(self, transport: httpx.AsyncBaseTransport) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(httpx.ConnectError):
                await transport.handle_async_request(request_to(url))
        for url in ("http://no-such-host.invalid", "http://localhost:1"):
            with pytest.raises(httpx.ConnectError):
                await transport.handle_async_request(request_to(url))


class TestKeptConnections:
    async def test_one_connection_serves_many_requests(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        for number in range(5):
            _, body = await fetch(transport, upstream, b"/%d" % number)
            assert json.loads(body)["target"] == f"/{number}"
        assert upstream.connections_opened == 1

    async def test_requests_at_once_have_a_connection_each(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        answers = await asyncio.gather(*(fetch(transport, upstream, b"/%d" % number) for number in range(30)))
        targets = [json.loads(body)["target"] for _, body in answers]
        assert targets == [f"/{number}" for number in range(30)]

    @pytest.mark.parametrize("version", [b"1.1", b"1.0"])
    async def test_a_connection_that_will_be_closed_is_not_kept(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, version: bytes
    ) -> None:
        connection = b"" if version == b"1.0" else b"Connection: close\r\n"
        upstream.script = raw_answer(b"HTTP/%b 200 OK\r\n%bContent-Length: 2\r\n\r\nok" % (version, connection))
        for _ in range(2):
            assert await fetch(transport, upstream) == (200, b"ok")
        assert upstream.connections_opened == 2

    async def test_a_dead_idle_connection_is_not_used(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        await fetch(transport, upstream)
        await asyncio.to_thread(upstream.drop_idle_connections)
        assert (await fetch(transport, upstream, method="POST", body=b"x"))[0] == 200
        assert upstream.connections_opened == 2

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_a_post_is_never_sent_twice(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream, streamed: bool
    ) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b"x"

        async def script(exchange: Exchange) -> None:
            await exchange.read_body()
            await exchange.close()

        await fetch(transport, upstream)
        upstream.script = script
        request: dict[str, Any] = {"method": "POST", "body": b"x"}
        if streamed:
            request = {"method": "PUT", "fields": [CHUNKED], "body": parts()}
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await call(transport, upstream, **request)
        assert len(upstream.requests) == 2

    @pytest.mark.parametrize(("method", "body"), [("GET", b""), ("PUT", b"x"), ("DELETE", b"")])
    async def test_what_may_be_repeated_is_once(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream, method: str, body: bytes
    ) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.read_body()
            if exchange.request.connection == 1:
                await exchange.close()
            else:
                await exchange.answer(b"again")

        await fetch(ours, upstream)
        upstream.script = script
        assert await fetch(ours, upstream, method=method, body=body) == (200, b"again")
        assert len(upstream.requests) == 3

    async def test_nothing_is_repeated_on_a_fresh_connection_or_after_a_byte(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        upstream.script = raw_answer(b"", close=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await call(ours, upstream)
        assert len(upstream.requests) == 1
        upstream.script = raw_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await fetch(ours, upstream)
        upstream.script = raw_answer(b"H", close=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await call(ours, upstream)
        assert len(upstream.requests) == 3

    async def test_bytes_nobody_asked_for_do_not_become_an_answer(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
        stray = Gate()

        async def with_the_answer(exchange: Exchange) -> None:
            await exchange.send(whole + b"real" + whole + b"evil")

        async def later(exchange: Exchange) -> None:
            await exchange.send(whole + b"real")
            await stray.wait()
            await exchange.send(whole + b"evil")

        upstream.script = with_the_answer
        assert await fetch(ours, upstream) == (200, b"real")
        upstream.script = later
        assert await fetch(ours, upstream) == (200, b"real")
        stray.open()
        await until(lambda: upstream.open_connections == 0)
        upstream.script = raw_answer(whole + b"fine")
        assert await fetch(ours, upstream) == (200, b"fine")
        assert upstream.connections_opened == 3

    async def test_a_body_for_a_head_request_does_not_become_an_answer(
        self, ours: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        upstream.script = raw_answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        assert await fetch(ours, upstream, method="HEAD") == (200, b"")
        assert await fetch(ours, upstream) == (200, b"evil")
        assert upstream.connections_opened == 2


class TestTls:
    async def test_the_extra_authority_is_trusted_and_the_name_is_sent(
        self, make_transport: MakeTransport, ca_file: str, authority: trustme.CA
    ) -> None:
        seen: list[tuple[str | None, str | None]] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        context.set_alpn_protocols(["h2", "http/1.1"])
        context.sni_callback = lambda sock, name, _: seen.append((name, sock.selected_alpn_protocol()))
        with FakeUpstream(tls=context) as upstream:
            transport = make_transport(extra_ca_file=ca_file)
            url = f"https://localhost:{upstream.port}"
            for _ in range(2):
                response = await transport.handle_async_request(request_to(url, method="POST", body=b"hi"))
                assert json.loads(await read(response))["body"] == "hi"
            assert upstream.connections_opened == 1
        assert [name for name, _ in seen] == ["localhost"]

    async def test_an_unknown_authority_or_another_name_is_a_connect_error(
        self, make_transport: MakeTransport, ca_file: str, authority: trustme.CA
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("elsewhere.example").configure_cert(context)
        with FakeUpstream(tls=context) as upstream:
            for trusting in (None, ca_file):
                with pytest.raises(httpx.ConnectError):
                    await call(make_transport(extra_ca_file=trusting), upstream)

    async def test_no_tls_on_the_other_side_is_a_connect_error(
        self, transport: httpx.AsyncBaseTransport, upstream: FakeUpstream
    ) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(request_to(url))
        server.close()

    @pytest.mark.parametrize("framing", [b"Content-Length: 3000000\r\n", b""])
    async def test_a_slow_reader_gets_everything_sent_before_the_end(
        self,
        make_transport: MakeTransport,
        ca_file: str,
        server_tls: ssl.SSLContext,
        framing: bytes,
    ) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.send(b"HTTP/1.1 200 OK\r\n%bConnection: close\r\n\r\n%b" % (framing, b"z" * 3_000_000))
            await exchange.close()

        with FakeUpstream(script, tls=server_tls) as upstream:
            response = await call(make_transport(extra_ca_file=ca_file), upstream)
            received = 0
            async for chunk in response.stream:  # type: ignore[union-attr]
                received += len(chunk)
                for _ in range(20):
                    await asyncio.sleep(0)
            assert received == 3_000_000

    async def test_what_was_there_before_the_end_is_delivered(
        self, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        gate = Gate()

        async def script(exchange: Exchange) -> None:
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 250000\r\n\r\n")
            await gate.wait()
            for _ in range(25):
                await exchange.send(b"z" * 10_000)
            exchange.abort()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            upstream.signals.put("closed")

        with FakeUpstream(script, tls=server_tls) as upstream:
            response = await call(make_transport(extra_ca_file=ca_file), upstream)
            gate.open()
            # Blocks this loop on purpose: the body and the end are there together when it looks again.
            upstream.signals.get(timeout=PATIENCE_S)
            assert await read(response) == b"z" * 250_000

    async def test_events_come_one_by_one_and_large_bodies_whole(
        self, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        gate = Gate()

        async def script(exchange: Exchange) -> None:
            body = await exchange.read_body()
            await exchange.start_stream()
            await exchange.chunk(b"first")
            await gate.wait()
            await exchange.chunk(body)
            await exchange.end_stream()

        with FakeUpstream(script, tls=server_tls) as upstream:
            transport = make_transport(extra_ca_file=ca_file)
            response = await call(transport, upstream, method="POST", body=b"q" * 2_000_000)
            chunks = aiter(response.stream)  # type: ignore[arg-type]
            assert await anext(chunks) == b"first"
            gate.open()
            assert b"".join([chunk async for chunk in chunks]) == b"q" * 2_000_000


class TestEgressProxies:
    @pytest.fixture(params=[ConnectProxy, Socks5Proxy])
    def kind(self, request: pytest.FixtureRequest) -> type[EgressProxy]:
        kind: type[EgressProxy] = request.param
        return kind

    @pytest.mark.parametrize("user", ["", "ann"])
    async def test_tls_goes_through_with_the_name_unresolved(
        self,
        make_transport: MakeTransport,
        kind: type[EgressProxy],
        ca_file: str,
        server_tls: ssl.SSLContext,
        user: str,
    ) -> None:
        with FakeUpstream(tls=server_tls) as upstream, kind(user=user, password="s:e cret") as proxy:
            url = proxy.url(password="s%3Ae%20cret")
            for scheme in {"http": ["http"], "socks5": ["socks5", "socks5h"]}[kind.scheme]:
                transport = make_transport(
                    extra_ca_file=ca_file, proxy_url=url.replace(f"{kind.scheme}:", f"{scheme}:")
                )
                target = f"https://localhost:{upstream.port}"
                for _ in range(2):
                    response = await transport.handle_async_request(request_to(target))
                    assert response.status_code == 200
                    await read(response)
                assert proxy.asked_for.pop() == ("localhost", upstream.port)
                assert proxy.asked_for == []

    async def test_plain_http_goes_through_ours(
        self,
        ours: httpx.AsyncBaseTransport,
        make_transport: MakeTransport,
        kind: type[EgressProxy],
        upstream: FakeUpstream,
    ) -> None:
        with kind() as proxy:
            assert (await fetch(make_transport(proxy_url=proxy.url()), upstream))[0] == 200
            assert proxy.asked_for == [("127.0.0.1", upstream.port)]

    async def test_a_wrong_password_is_a_proxy_error(
        self, make_transport: MakeTransport, kind: type[EgressProxy]
    ) -> None:
        with kind(user="ann", password="right") as proxy:
            transport = make_transport(proxy_url=proxy.url(password="wrong"))
            with pytest.raises(httpx.ProxyError):
                await transport.handle_async_request(request_to("https://localhost:1"))

    async def test_no_proxy_there_is_a_connect_error(
        self, make_transport: MakeTransport, kind: type[EgressProxy]
    ) -> None:
        transport = make_transport(proxy_url=f"{kind.scheme}://127.0.0.1:1")
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(request_to("https://localhost:1"))

    async def test_leaving_a_proxy_that_never_answers_closes_its_connection(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, kind: type[EgressProxy]
    ) -> None:
        here: queue.Queue[str] = queue.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(65536):
                here.put("here")
            here.put("left")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        proxy_url = f"{kind.scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        transport = make_transport(proxy_url=proxy_url)
        with pytest.raises(httpx.ConnectTimeout):
            await transport.handle_async_request(request_to("https://localhost:1", timeouts={"connect": 1.0}))
        assert await asyncio.to_thread(here.get, True, PATIENCE_S) == "here"
        assert await asyncio.to_thread(here.get, True, LEFT_WITHIN_S) == "left"
        server.close()
