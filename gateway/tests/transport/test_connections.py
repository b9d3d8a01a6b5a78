"""What the relay expects of a transport: connections that are left, and those that are kept."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import pytest

from gateway.tests.calls import (
    CHUNKED,
    LEFT_WITHIN_S,
    PATIENCE_S,
    MakeTransport,
    call,
    fetch,
    read,
    request_to,
    signal_from,
    until,
)
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, raw_answer


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
