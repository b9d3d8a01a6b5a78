"""What large bodies and clients that do not read cost the relay, with either transport."""

from __future__ import annotations

import asyncio
import queue
import socket

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, new_client
from gateway.tests.raw_client import RawClient
from gateway.tests.relayed import MIB, fetch


def growth_bytes(proxy: LiveProxy, before: int) -> int:
    return proxy.worker_rss_bytes() - before


def test_large_bodies_cost_little_memory(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    size = 1024 * MIB
    part = bytes(MIB)

    async def download(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // MIB):
            await exchange.send(part)

    async def upload(exchange: Exchange) -> None:
        received = 0
        while part := await exchange.read_some_body():
            received += len(part)
            exchange.request.body.clear()
        await exchange.answer(b"%d" % received)

    fetch(proxy)
    before = proxy.worker_rss_bytes()
    upstream.script = download
    received = 0
    with new_client() as http, http.stream("GET", f"{proxy.url}/v1/files/f/content", timeout=60) as answer:
        for chunk in answer.iter_raw():
            received += len(chunk)
    assert received == size
    assert growth_bytes(proxy, before) < 20 * MIB

    upstream.script = upload
    with new_client() as client:
        answer = client.post(f"{proxy.url}/v1/files", content=(part for _ in range(size // MIB)))
    assert int(answer.content) == size
    assert growth_bytes(proxy, before) < 20 * MIB


def test_a_client_that_hardly_reads_costs_little_memory_and_stops_the_upstream(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    fetch(proxy)
    before = proxy.worker_rss_bytes()
    stopped = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1024 * MIB))
        sent = 0
        part = bytes(MIB // 4)
        while sent < 1024 * MIB:
            try:
                async with asyncio.timeout(1.0):
                    await exchange.send(part)
            except TimeoutError:
                break
            sent += len(part)
        upstream.signals.put(sent)
        stopped.open()
        exchange.abort()

    upstream.script = script
    with RawClient(proxy) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.get("/v1/files/f/content")
        for _ in range(100):
            client.socket.recv(1)
        assert stopped.wait_in_thread()
        assert growth_bytes(proxy, before) < 20 * MIB
    sent = upstream.signals.get_nowait()
    assert isinstance(sent, int)
    assert sent < 64 * MIB


def test_a_client_that_asks_and_asks_and_never_reads_is_left_waiting(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    body = bytes(MIB // 4)

    async def script(exchange: Exchange) -> None:
        upstream.signals.put("asked")
        await exchange.answer(body)

    upstream.script = script
    with RawClient(proxy) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(256):
            client.send(b"GET /v1/%d HTTP/1.1\r\nHost: h\r\n\r\n" % number)
            try:
                upstream.signals.get(timeout=3)
            except queue.Empty:
                break
    assert 0 < number < 100
