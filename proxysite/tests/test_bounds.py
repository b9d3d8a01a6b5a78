"""What may come in from a client, and how long either side may be silent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, answer_at_once
from gateway.tests.live import PATIENCE_S, LiveProxy, wait_until
from gateway.tests.raw_client import RawClient

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
SILENCE_S = 2.0


@pytest.fixture(scope="module")
def _strict_proxy(shared_upstream: FakeUpstream) -> object:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url, MAX_HEADER_BYTES="4096", MAX_BODY_BYTES="10000", MAX_OPEN_STREAMS="2"
    ) as proxy:
        yield proxy


@pytest.fixture
def strict_proxy(_strict_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    """A proxy that lets little in, but takes its time."""
    return _strict_proxy


@pytest.fixture(scope="module")
def _hasty_proxy(shared_upstream: FakeUpstream) -> object:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url,
        HEADER_TIMEOUT_SECONDS="1",
        KEEPALIVE_SECONDS="1",
        FIRST_BYTE_TIMEOUT_SECONDS=str(SILENCE_S),
        SILENCE_TIMEOUT_SECONDS=str(SILENCE_S),
    ) as proxy:
        yield proxy


@pytest.fixture
def hasty_proxy(_hasty_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    """A proxy with short time limits: nothing that must be done within them is asked of a busy machine."""
    return _hasty_proxy


@pytest.mark.parametrize("part_bytes", [100, 100_000])
def test_too_many_header_bytes_are_refused(strict_proxy: LiveProxy, upstream: FakeUpstream, part_bytes: int) -> None:
    with RawClient(strict_proxy) as client:
        data = HEAD + b"".join(b"X-%d: %b\r\n" % (n, b"y" * 50) for n in range(100)) + b"\r\n"
        try:
            for at in range(0, len(data), part_bytes):
                client.send(data[at : at + part_bytes])
        except ConnectionError:
            pass
        answer = client.answer()
    assert answer.status == 431
    assert answer.value("x-request-id") == answer.value("x-proxy-request-id")
    assert answer.value("x-request-id")
    assert json.loads(answer.body)["error"]["code"] == "headers_too_large"
    assert not upstream.requests


def test_one_endless_header_costs_no_memory(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    before = own_proxy.worker_rss_bytes()
    with RawClient(own_proxy) as client:
        client.send(HEAD + b"X-Long: ")
        try:
            for _ in range(200):
                client.send(b"y" * 100_000)
        except ConnectionError:
            pass
        assert own_proxy.worker_rss_bytes() - before < 10 << 20


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_bound_is_refused(strict_proxy: LiveProxy, upstream: FakeUpstream, chunked: bool) -> None:
    with RawClient(strict_proxy) as client:
        if chunked:
            client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 3)
        else:
            client.send(HEAD + b"Content-Length: 10001\r\n\r\n")
        answer = client.answer()
    assert answer.status == 413
    assert json.loads(answer.body)["error"]["code"] == "request_too_large"
    assert not any(request.complete for request in upstream.requests)


def test_a_body_of_one_chunk_beyond_the_bound_is_refused(strict_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(strict_proxy) as client:
        head = b"POST /v1/files HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.send(head + b"2711\r\n" + b"x" * 10_001 + b"\r\n0\r\n\r\n")
        assert client.answer().status == 413
    assert not upstream.requests


def test_a_body_at_the_bound_passes(strict_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    assert strict_proxy.post("/v1/files", content=b"x" * 10_000).status_code == 200


def test_streams_beyond_the_bound_are_told_to_come_back(strict_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    go_on = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.events({"number": 1}, done=False)
        await go_on.wait()
        await exchange.end_stream()

    upstream.script = script
    with RawClient(strict_proxy) as first, RawClient(strict_proxy) as second:
        for client in (first, second):
            client.get("/v1/stream")
            client.read_until(b"\n\n")
        refused = strict_proxy.get("/v1/models")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "gateway_overloaded"
        go_on.open()
        first.read_until(b"0\r\n\r\n")
        second.read_until(b"0\r\n\r\n")
    upstream.script = answer_at_once
    # The proxy may count a stream for a moment after its client has seen the end.
    wait_until(lambda: strict_proxy.get("/v1/models").status_code == 200)


def test_streams_that_come_at_one_moment_are_counted_one_by_one(
    strict_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    go_on = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await go_on.wait()
        await exchange.answer()

    (worker,) = strict_proxy.worker_pids
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(strict_proxy)) for _ in range(6)]
        for client in clients:  # known to the worker, which then reads from all of them in one turn
            client.get()
            assert client.answer().status == 200
        upstream.script = script
        os.kill(worker, signal.SIGSTOP)
        for client in clients:
            client.get()
        os.kill(worker, signal.SIGCONT)
        wait_until(lambda: len(upstream.requests) == 6 + 2)
        go_on.open()
        assert sorted(client.answer().status for client in clients) == [200, 200, 503, 503, 503, 503]
    upstream.script = answer_at_once
    wait_until(lambda: strict_proxy.get("/v1/models").status_code == 200)


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET /v1/mo", b"GET /v1/models HTTP/1.1\r\nHost: h\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(hasty_proxy: LiveProxy, begun: bytes) -> None:
    with RawClient(hasty_proxy) as client:
        client.send(begun)
        client.read_to_end()


def test_an_idle_connection_is_closed(hasty_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(hasty_proxy) as client:
        client.get()
        assert client.answer().status == 200
        assert client.read_to_end() == b""


def test_an_upload_that_stops_is_given_up(hasty_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    for sent in (b"", b"abc"):
        with RawClient(hasty_proxy) as client:
            client.send(HEAD + b"Content-Length: 10\r\n\r\n" + sent)
            answer = client.answer()
        assert answer.status == 408
        assert json.loads(answer.body)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("is_connected", [True, False])
def test_an_upstream_that_never_answers_is_given_up(
    hasty_proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool
) -> None:
    if is_connected:
        assert hasty_proxy.get("/v1/models").status_code == 200
    else:
        upstream.drop_idle_connections()

    async def script(exchange: Exchange) -> None:
        upstream.signals.put(await exchange.wait_until_client_leaves())
        exchange.abort()

    upstream.script = script
    answer = hasty_proxy.post("/v1/chat/completions", json={})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_timeout"
    assert upstream.signals.get(timeout=PATIENCE_S)


def test_an_upstream_that_falls_silent_is_given_up(hasty_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.events({"number": 1}, done=False)
        await exchange.wait_until_client_leaves()
        exchange.abort()

    upstream.script = script
    with RawClient(hasty_proxy) as client:
        client.get("/v1/stream")
        answer = client.answer()
    assert answer.end in ("closed", "reset")
    assert b'"code": "upstream_timeout"' in answer.body


def test_a_slow_client_is_not_the_upstreams_silence(hasty_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    size = 30 << 20

    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        await exchange.send(bytes(size))

    upstream.script = script
    with RawClient(hasty_proxy) as client:
        client.get("/v1/files/f/content")
        client.read_until(b"\r\n\r\n")
        time.sleep(2 * SILENCE_S)  # time itself is what is tested
        received = len(client._data)
        while received < size:
            received += len(client.socket.recv(1 << 20))
    assert received == size


def test_an_upstream_that_cannot_be_reached_gives_502() -> None:
    with LiveProxy(UPSTREAM_URL="http://127.0.0.1:9") as proxy:
        answer = proxy.get("/v1/models")
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_unreachable"


def test_an_upstream_that_accepts_no_connection_gives_504(upstream: FakeUpstream) -> None:
    with socket.socket() as full:
        # A listener with a full backlog: connection attempts hang.
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(4):
            attempt = socket.socket()
            attempt.setblocking(False)
            attempt.connect_ex(full.getsockname())
            waiting.append(attempt)
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with LiveProxy(UPSTREAM_URL=url, CONNECT_TIMEOUT_SECONDS="0.5") as proxy:
            answer = proxy.get("/v1/models")
        for attempt in waiting:
            attempt.close()
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "upstream_timeout"
