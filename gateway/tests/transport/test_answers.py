"""What the relay expects of a transport: the way down, and answers that are cut or none."""

from __future__ import annotations

import asyncio
import gzip

import httpx2 as httpx
import pytest

from gateway.outgoing import OutgoingRequest
from gateway.tests.calls import PATIENCE_S, call, fetch, read, signal_from
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, raw_answer, reset


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
