"""What `TlsTransport` does beyond what every transport is expected to do (see transport/test_tls.py)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import ssl

import pytest
import trustme

from gateway.tests.calls import fetch, until
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tls import ReadBuffer, TlsTransport, attach
from gateway.transport import PooledTransport

NAME = "upstream.example"


class Recorder(asyncio.BufferedProtocol):
    def __init__(self, buffer: ReadBuffer) -> None:
        self.buffer = buffer
        self.received = b""
        self.is_paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer.plain

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer.plain[:nbytes]

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def records_of(sealed: bytes) -> list[bytes]:
    records = []
    while sealed:
        end = 5 + int.from_bytes(sealed[3:5], "big")
        records.append(sealed[:end])
        sealed = sealed[end:]
    return records


async def test_what_is_written_within_a_session_ticket_waits_for_its_end(authority: trustme.CA) -> None:
    # A ticket holds the client's certificate: with this one it is longer than a record.
    names = [f"number-{number}.of-many.example" for number in range(1000)]
    server, client = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.verify_mode = ssl.CERT_REQUIRED
    authority.issue_cert(NAME).configure_cert(server)
    authority.issue_cert(*names).configure_cert(client)
    for context in (server, client):
        authority.configure_trust(context)
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    loop = asyncio.get_running_loop()
    recorder = Recorder(ReadBuffer())
    attaching = asyncio.create_task(
        attach(recorder, ours, buffer=recorder.buffer, context=client, server_hostname=NAME)
    )
    sealed_in, sealed_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = server.wrap_bio(sealed_in, sealed_out, server_side=True)
    while True:
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
            break
        await loop.sock_sendall(theirs, sealed_out.read())
        sealed_in.write(await loop.sock_recv(theirs, 65536))
    await attaching
    tickets = records_of(sealed_out.read())
    assert len(tickets[0]) > 16_384 > len(tickets[1])  # two records, one message

    transport = recorder.transport
    assert isinstance(transport, TlsTransport)

    def arrive(sealed: bytes) -> None:
        transport.get_buffer(-1)[: len(sealed)] = sealed
        transport.buffer_updated(len(sealed))

    arrive(tickets[0])
    transport.write(b"one")
    transport.write(b"two")
    assert recorder.is_paused
    assert transport.get_write_buffer_size() == 6
    arrive(tickets[1])
    assert not recorder.is_paused
    assert transport.get_write_buffer_size() == 0
    received = b""
    while len(received) < 6:
        sealed_in.write(await loop.sock_recv(theirs, 65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                received += tls.read()
    assert received == b"onetwo"
    transport.abort()
    theirs.close()


def resident_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_kept_connection_does_not_keep_room_for_its_largest_body(authority: trustme.CA) -> None:
    connections, body = 30, b"x" * 4_000_000
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(client)

    async def script(exchange: Exchange) -> None:
        while await exchange.read_some_body():
            exchange.request.body.clear()
        await exchange.answer()

    with FakeUpstream(script, tls=server) as upstream:
        transport = PooledTransport(ssl_context=client)
        before = resident_bytes()
        await asyncio.gather(*(fetch(transport, upstream, method="POST", body=body) for _ in range(connections)))
        await until(lambda: transport.idle == connections)
        assert resident_bytes() - before < connections * len(body) // 2
        await transport.aclose()
