"""What the relay expects of a transport: TLS to the upstream."""

from __future__ import annotations

import asyncio
import json
import ssl

import httpx2 as httpx
import pytest
import trustme

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S, MakeTransport, call, read, request_to, until
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, hanging_up
from gateway.transport import PooledTransport


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

    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_an_upstream_that_hangs_up_at_once_is_an_error_at_once(
        self, transport: httpx.AsyncBaseTransport, scheme: str
    ) -> None:
        with hanging_up() as port:
            for _ in range(5):  # whether it is heard of before TLS begins is a matter of one turn of the loop
                asking = transport.handle_async_request(request_to(f"{scheme}://127.0.0.1:{port}"))
                with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
                    await asyncio.wait_for(asking, LEFT_WITHIN_S)
        if isinstance(transport, PooledTransport):
            await until(lambda: transport.busy == 0)

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
