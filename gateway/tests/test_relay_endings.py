"""Either side of the relay leaves or talks nonsense, with either transport."""

from __future__ import annotations

import socket

import pytest

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from gateway.tests.relayed import MIB, connect, either_way, fetch, plays


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("moment", ["waiting for the first byte", "inside a stream", "inside an upload"])
@either_way
def test_the_client_leaves_and_the_upstream_knows_soon(
    proxy: LiveProxy, upstream: FakeUpstream, moment: str, leave: str, is_connected: bool
) -> None:
    connect(proxy, upstream, is_connected)
    under_way = Gate()

    async def script(exchange: Exchange) -> None:
        if moment == "inside a stream":
            await exchange.read_body()
            await exchange.start_stream()
            await exchange.events({"number": 1}, done=False)
        elif moment == "inside an upload":
            await exchange.read_some_body()
        under_way.open()
        upstream.signals.put(await exchange.wait_until_client_leaves())
        exchange.abort()

    upstream.script = script
    with RawClient(proxy) as client:
        if moment == "inside an upload":
            client.request("POST", "/v1/files", "Content-Length: 100")
            client.send(b"abc")
        else:
            client.request("POST", "/v1/chat/completions", body=b"{}")
        assert under_way.wait_in_thread()
        if moment == "inside a stream":
            client.read_until(b"\n\n")
        if leave == "reset":
            client.reset()
    waited_s = upstream.signals.get(timeout=PATIENCE_S)
    assert isinstance(waited_s, float)
    assert waited_s < LEFT_WITHIN_S


def test_a_client_that_closes_its_side_for_writing_has_left(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        upstream.signals.put("asked")
        upstream.signals.put(await exchange.wait_until_client_leaves())

    upstream.script = script
    with RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        assert upstream.signals.get(timeout=PATIENCE_S) == "asked"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
    waited_s = upstream.signals.get(timeout=PATIENCE_S)
    assert isinstance(waited_s, float)
    assert waited_s < LEFT_WITHIN_S


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 502),
        (b"HTTP/1.1 20", 502),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc", 502),
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (2 * MIB) + b"\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n\x1f\x8b\r\n0\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, identity\r\n\r\n2\r\nok\r\n0\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n\x1f\x8b", 502),
    ],
    ids=range(11),
)
@either_way
def test_an_upstream_that_leaves_or_talks_nonsense_gives_an_error_in_openais_form(
    proxy: LiveProxy, upstream: FakeUpstream, raw: bytes, status: int, is_connected: bool
) -> None:
    connect(proxy, upstream, is_connected)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(raw)
        await exchange.close()

    upstream.script = script
    answer = fetch(proxy, "/v1/chat/completions", "POST", json={})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["access-control-allow-origin"] == "*"


def test_an_answer_with_two_framings_is_no_answer(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )
    assert fetch(own_proxy).status_code == 502


def test_an_early_answer_reaches_a_client_that_is_still_uploading(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_some_body()
        await exchange.answer(b'{"error": "too large"}', status="413 Payload Too Large")
        await exchange.wait_until_client_leaves()

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.request("POST", "/v1/files", "Content-Length: 50000000")
        client.send(b"x" * 1000)
        answer = client.answer()
    assert (answer.status, answer.body) == (413, b'{"error": "too large"}')


def test_a_connection_that_the_upstream_closed_while_idle_costs_nobody_a_request(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    for _ in range(5):
        assert fetch(proxy, "/v1/chat/completions", "POST", json={}).status_code == 200
        upstream.drop_idle_connections()
    assert len(upstream.requests) == 5


def test_connections_to_the_upstream_are_reused(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    for _ in range(5):
        fetch(proxy)
    assert len({request.connection for request in upstream.requests}) == 1
