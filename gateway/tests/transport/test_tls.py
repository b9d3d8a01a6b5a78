"""What the relay expects of a transport: TLS to the upstream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
import trustme

from gateway.tests.calls import (
    CHUNKED,
    LEFT_WITHIN_S,
    LENGTH_OF_A_GIGABYTE,
    PATIENCE_S,
    MakeTransport,
    call,
    endless,
    fetch,
    read,
    request_to,
    until,
)
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, hanging_up
from gateway.transport import PooledTransport

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"  # of an answer that ends with its connection

FORGED = b"\x17\x03\x03\x00\x40" + b"forged!!" * 8
MOST_SENT = 400_000_000
FLOOD = f"""
import contextlib, os, signal
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
os.set_blocking(0, True)
sent, block = 0, {FORGED!r} + b"x" * (1 << 20)
with contextlib.suppress(OSError):
    while sent < {MOST_SENT}:
        sent += os.write(0, block)
print(sent)
"""


class Line:
    """The server's side of one TLS connection, whose bytes a test may hold in its hands; blocking."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, send_bytes: int = 1 << 20) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._send_bytes = send_bytes
        self._sealed_in, self._sealed_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._sealed_in, self._sealed_out, server_side=True)
        self._until_done(self.tls.do_handshake)

    def read_head(self) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._until_done(self.tls.read)

    def say_goodbye(self) -> None:
        """Send a close_notify, and leave the connection open."""
        with contextlib.suppress(ssl.SSLError):  # which waits for the other side's, or finds more of its data
            self.tls.unwrap()
        self.send(b"")

    def send(self, data: bytes) -> None:
        if data:
            self.tls.write(data)
        sealed = self._sealed_out.read()
        for at in range(0, len(sealed), self._send_bytes):
            self.sock.sendall(sealed[at : at + self._send_bytes])

    def wait_until_left(self) -> None:
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(65536):
                pass

    def _until_done(self, act: Callable[[], Any]) -> Any:
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                self.send(b"")
                if not (data := self.sock.recv(65536)):
                    raise ConnectionResetError from None
                self._sealed_in.write(data)
            finally:
                self.send(b"")


@contextlib.contextmanager
def serving(
    context: ssl.SSLContext, act: Callable[[Line], None], *, send_bytes: int = 1 << 20
) -> Iterator[tuple[str, threading.Event]]:
    """Let `act` answer one connection's first request; yield the URL, and what tells that it is done."""
    done = threading.Event()

    def serve() -> None:
        sock, _ = server.accept()
        with sock:
            sock.settimeout(PATIENCE_S)
            line = Line(sock, context, send_bytes=send_bytes)
            line.read_head()
            act(line)
            done.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{server.getsockname()[1]}", done
        thread.join(PATIENCE_S)


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

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_a_byte_at_a_time_is_enough(
        self, make_transport: MakeTransport, ca_file: str, authority: trustme.CA, version: ssl.TLSVersion
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = version
        authority.issue_cert("127.0.0.1").configure_cert(context)

        def act(line: Line) -> None:
            line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
            line.send(b"z" * 500)
            line.wait_until_left()

        with serving(context, act, send_bytes=1) as (url, _):
            transport = make_transport(extra_ca_file=ca_file)
            response = await transport.handle_async_request(request_to(url))
            assert await read(response) == b"z" * 500
            await transport.aclose()

    async def test_a_goodbye_ends_the_answer_and_the_connection(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        def act(line: Line) -> None:
            line.send(HEAD + b"all of it")
            line.say_goodbye()
            line.wait_until_left()

        with serving(server_tls, act) as (url, done):
            transport = make_transport(extra_ca_file=ca_file)
            response = await transport.handle_async_request(request_to(url))
            assert await read(response) == b"all of it"
            assert await asyncio.to_thread(done.wait, LEFT_WITHIN_S)

    async def test_a_goodbye_before_the_end_is_an_error(
        self, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        def act(line: Line) -> None:
            line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhalf")
            line.say_goodbye()
            line.wait_until_left()

        with serving(server_tls, act) as (url, _):
            response = await make_transport(extra_ca_file=ca_file).handle_async_request(request_to(url))
            with pytest.raises(httpx.RemoteProtocolError):
                await read(response)

    async def test_a_forged_record_is_an_error_and_not_an_end(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        def act(line: Line) -> None:
            line.send(HEAD + b"what was said")
            line.sock.sendall(FORGED)
            line.wait_until_left()

        with serving(server_tls, act) as (url, done):
            response = await make_transport(extra_ca_file=ca_file).handle_async_request(request_to(url))
            with pytest.raises(httpx.ReadError):
                await read(response)
            await response.aclose()
            assert await asyncio.to_thread(done.wait, LEFT_WITHIN_S)

    async def test_an_answer_during_the_upload_arrives_though_a_reset_is_right_behind_it(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        async def script(exchange: Exchange) -> None:
            await exchange.read_some_body()
            await exchange.answer(b"too large", status="413 Content Too Large")
            exchange.abort()

        with FakeUpstream(script, tls=server_tls) as upstream:
            transport = make_transport(extra_ca_file=ca_file)
            for framing in [LENGTH_OF_A_GIGABYTE, CHUNKED] * 10:
                answer = await fetch(transport, upstream, method="POST", fields=[framing], body=endless())
                assert answer == (413, b"too large")

    async def test_an_upstream_that_hangs_up_behind_its_handshake_is_an_error_at_once(
        self, ours: PooledTransport, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        def serve() -> None:
            for _ in range(5):
                sock, _ = server.accept()
                with sock:
                    sealed_in, sealed_out = ssl.MemoryBIO(), ssl.MemoryBIO()
                    tls = server_tls.wrap_bio(sealed_in, sealed_out, server_side=True)
                    sealed_in.write(sock.recv(65536))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.do_handshake()
                    # Of TLS 1.3 this is all that a client needs to begin.
                    sock.sendall(sealed_out.read())

        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            transport = make_transport(extra_ca_file=ca_file)
            for _ in range(5):
                request = request_to(f"https://127.0.0.1:{server.getsockname()[1]}")
                with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
                    await asyncio.wait_for(transport.handle_async_request(request), LEFT_WITHIN_S)
            assert isinstance(transport, PooledTransport)
            await until(lambda: transport.busy == 0)
            thread.join(PATIENCE_S)

    async def test_a_refusal_that_ends_with_a_goodbye_arrives_though_a_reset_is_right_behind_it(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        def act(line: Line) -> None:
            line.sock.recv(1)
            line.send(b"HTTP/1.1 413 Content Too Large\r\n\r\nto the end")
            line.say_goodbye()  # closed with bytes unread: that is a reset

        for _ in range(5):
            with serving(server_tls, act) as (url, _):
                request = request_to(url, method="POST", fields=[CHUNKED], body=endless())
                response = await make_transport(extra_ca_file=ca_file).handle_async_request(request)
                assert (response.status_code, await read(response)) == (413, b"to the end")

    async def test_nothing_is_read_behind_a_forged_record(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, ca_file: str, server_tls: ssl.SSLContext
    ) -> None:
        sent: list[int] = []

        def act(line: Line) -> None:
            line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            # A process of its own, which is never slower than who reads.
            flood = subprocess.run([sys.executable, "-c", FLOOD], stdin=line.sock, capture_output=True, check=True)
            sent.append(int(flood.stdout))

        with serving(server_tls, act) as (url, done):
            request = request_to(url, method="POST", body=b"x" * 100_000)
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await make_transport(extra_ca_file=ca_file).handle_async_request(request)
            assert await asyncio.to_thread(done.wait, PATIENCE_S)
        assert sent[0] < MOST_SENT // 16
