"""Answers that others follow (102, 103): they reach whoever knows them, and change nothing else."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, reset
from gateway.tests.live import LiveProxy
from gateway.tests.metered import Ledger, answer_json, post
from gateway.tests.raw_client import RawClient
from gateway.tests.relayed import connect, either_way, plays

HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nlink: </b>\r\n\r\n"
WORKING = b"HTTP/1.1 102 Processing\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
MOST = 64  # the default of MAX_INTERIM_RESPONSES


@either_way
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_holds_them_while_the_upstream_is_at_work(
    own_proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool, is_stream: bool
) -> None:
    gates = [Gate(), Gate()]

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        for interim, gate in zip((HINTS, WORKING), gates, strict=True):
            await exchange.send(interim)
            await gate.wait()
        if is_stream:
            await exchange.start_stream()
            await exchange.chunk(b"data: 1\n\n")
            await exchange.end_stream()
        else:
            await exchange.answer()

    connect(own_proxy, upstream, is_connected)
    upstream.script = script
    with RawClient(own_proxy) as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        for interim, gate in zip((HINTS, WORKING), gates, strict=True):
            assert client.read_until(b"\r\n\r\n") == interim
            gate.open()
        answer = client.answer()
        assert (answer.status, answer.body, answer.end) == (200, b"data: 1\n\n" if is_stream else b"{}", "whole")
        upstream.script = plays(WORKING + ANSWER)  # type: ignore[assignment]
        client.get()
        assert client.read_until(b"\r\n\r\n") == WORKING
        assert client.answer().status == 200


@either_way
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_they_may_come_with_the_answer_and_its_like_at_once(
    own_proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool, method: str
) -> None:
    connect(own_proxy, upstream, is_connected)
    unknown = b"HTTP/1.1 142 So far so good\r\nX-A: 1\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 100 Continue\r\n\r\n" + HINTS + unknown + HINTS + head + (b"{}" if method == "GET" else b"")
    )
    with RawClient(own_proxy) as client:
        client.request(method, "/v1/models")
        found = b"".join(client.read_until(b"\r\n\r\n") for _ in range(3))
        assert found == HINTS + unknown + HINTS
        answer = client.answer(to_head=method == "HEAD")
        assert (answer.status, answer.end) == (200, "whole")


def test_only_what_is_end_to_end_and_fits_passes(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nDate: d\r\nSet-Cookie: a=b\r\nConnection: x-hop\r\nX-Hop: 1\r\n"
        b"Keep-Alive: 5\r\nAlt-Svc: h3\r\nContent-Length: 4\r\nTrailer: x\r\nAccess-Control-Allow-Origin: a\r\n\r\n"
        + ANSWER
    )
    with RawClient(own_proxy) as client:
        client.get()
        found = client.read_until(b"\r\n\r\n")
        assert found == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nDate: d\r\n\r\n"
        assert client.answer().status == 200


def test_a_client_of_http_1_0_gets_none(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(HINTS + ANSWER)  # type: ignore[assignment]
    with RawClient(own_proxy) as client:
        client.send(b"GET /v1/models HTTP/1.0\r\nHost: h\r\n\r\n")
        assert client.read_to_end().startswith(b"HTTP/1.1 200 OK\r\n")


def test_requests_sent_ahead_have_theirs_in_order(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        name = exchange.request.target.rpartition("/")[2].encode()
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % name + ANSWER)

    upstream.script = script
    with RawClient(own_proxy) as client:
        names = [b"%d" % number for number in range(4)]
        client.send(b"".join(b"GET /v1/models/%b HTTP/1.1\r\nHost: h\r\n\r\n" % name for name in names))
        for name in names:
            assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % name
            assert client.answer().status == 200


def test_an_upload_hears_of_them_behind_the_100_of_this_server(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await exchange.read_some_body() == b"abc"
        await exchange.send(WORKING)
        await exchange.read_body()
        await exchange.send(ANSWER)

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.request("POST", "/v1/files", "Expect: 100-continue", "Content-Length: 6")
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"abc")
        assert client.read_until(b"\r\n\r\n") == WORKING
        client.send(b"def")
        answer = client.answer()
        assert answer.raw.startswith(b"HTTP/1.1 200 ")
    assert upstream.requests[0].body == b"abcdef"


def test_a_request_with_them_is_one_request_in_the_ledger(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(HINTS + WORKING)
        await answer_json(exchange)

    upstream.script = script
    assert post(metered).status_code == 200
    ((endpoint, _, status, outcome, source, *tokens, _, _),) = ledger.new()
    assert (endpoint, status, outcome, source) == ("/v1/chat/completions", 200, "completed", "upstream")
    assert tokens == [60, 40, 30, 10]


def test_so_many_pass_and_the_rest_is_dropped(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(WORKING * 1000 + ANSWER)  # type: ignore[assignment]
    with RawClient(own_proxy) as client:
        client.get()
        found = client.read_until(b"{}")
    assert found.count(WORKING) == MOST
    assert found[MOST * len(WORKING) :].startswith(b"HTTP/1.1 200 OK\r\n")


@either_way
def test_an_upstream_that_sends_nothing_else_is_left(
    own_proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        with contextlib.suppress(ConnectionError):
            for _ in range(100_000):
                await exchange.send(HINTS * 100)
        exchange.abort()
        upstream.signals.put("left")

    connect(own_proxy, upstream, is_connected)
    upstream.script = script
    with RawClient(own_proxy) as client:
        client.get()
        found = client.read_until(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert found.count(HINTS) == MOST
        client.read_until(b"\r\n\r\n")
    assert upstream.signals.get(timeout=60) == "left"


def test_an_upstream_that_dies_behind_one_is_told_of_and_not_asked_again(
    own_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(HINTS)
        await passed.wait()
        reset(exchange)

    passed = Gate()
    connect(own_proxy, upstream, True)
    upstream.script = script
    with RawClient(own_proxy) as client:
        client.get()
        assert client.read_until(b"\r\n\r\n") == HINTS
        passed.open()
        assert client.answer().status == 502
    assert len(upstream.requests) == 1


def test_they_move_no_time_limit(upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(60):
                while not exchange.reader.at_eof():
                    await exchange.send(WORKING)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.1):
                            await exchange.reader.read(1)
        upstream.signals.put(exchange.reader.at_eof())

    upstream.script = script
    with LiveProxy(UPSTREAM_URL=upstream.url, FIRST_BYTE_TIMEOUT_SECONDS="1") as proxy, RawClient(proxy) as client:
        client.get()
        assert client.read_until(b"\r\n\r\n") == WORKING
        assert client.answer().status == 504
    assert upstream.signals.get(timeout=60)


def test_none_pass_where_the_operator_says_so(upstream: FakeUpstream) -> None:
    upstream.script = plays(HINTS + ANSWER)  # type: ignore[assignment]
    with LiveProxy(UPSTREAM_URL=upstream.url, MAX_INTERIM_RESPONSES="0") as proxy, RawClient(proxy) as client:
        client.get()
        assert client.read_until(b"\r\n").startswith(b"HTTP/1.1 200 ")
