"""The front: what may come in from a client, and how the process starts, stops and restarts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import PATIENCE_S, ROOT, LiveProxy, new_client
from gateway.tests.raw_client import RawClient

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
SILENCE_S = 2.0


# Request smuggling


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
        HEAD + b"Content-Length: +3\r\n\r\nabc",
        HEAD + b"Content-Length: -3\r\n\r\nabc",
        HEAD + b"Content-Length: 0x3\r\n\r\nabc",
        HEAD + b"Content-Length:\r\n\r\n",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X-A: b\r\n folded: c\r\n\r\n",
        HEAD + b"X-A: b\r\n\tfolded\r\n\r\n",
        HEAD + b"X-A: b\nX-B: c\r\n\r\n",
        HEAD + b"X-A: b\rX-B: c\r\n\r\n",
        HEAD + b"X-A: b\0c\r\n\r\n",
        HEAD + b"X-A : b\r\n\r\n",
        HEAD + b" X-A: b\r\n\r\n",
        HEAD + b": b\r\n\r\n",
        HEAD + b"Host: other\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
        b"POST /v1/x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\n\r\n",
        b"GET /v1/x HTTP/1.1\nHost: h\n\n",
        b"GET /v1/\x01 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v1/x#fragment HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v1/x HTTP/2.0\r\nHost: h\r\n\r\n",
        b"GET /v1/x HTTP/9.9\r\nHost: h\r\n\r\n",
        b"GET /v1/x y HTTP/1.1\r\nHost: h\r\n\r\n",
        b"G\x80T /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"(GET) /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls hello",
        b"A" * 2000 + b" /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
def test_a_request_that_two_readers_could_read_differently_is_refused(
    own_proxy: LiveProxy, upstream: FakeUpstream, request_bytes: bytes
) -> None:
    with RawClient(own_proxy) as client:
        client.send(request_bytes)
        answer = client.answer()
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
        assert answer.value("connection") == "close"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
    assert not any(request.complete for request in upstream.requests)


def test_bytes_behind_a_refused_request_are_not_a_request(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(own_proxy) as client:
        client.send(HEAD + b"X : y\r\n\r\nGET /v1/smuggled HTTP/1.1\r\nHost: h\r\n\r\n")
        assert client.answer().status == 400
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
    assert not upstream.requests


def test_an_unknown_method_behind_another_request_repeats_nothing(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(own_proxy) as client:
        client.send(HEAD + b"Content-Length: 2\r\n\r\n{}FROB /v1/x HTTP/1.1\r\nHost: h\r\n\r\n")
        assert [client.answer().status for _ in range(2)] == [200, 200]
    assert [(request.method, bytes(request.body)) for request in upstream.requests] == [("POST", b"{}"), ("FROB", b"")]


_SOUP = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            *(b"GET ", b"POST ", b"FROB ", b"/v1/models ", b"%2e%2e/", b"HTTP/1.1\r\n", b"\r\n", b"\0"),
            *(b"Host: h\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n"),
            *(b"0\r\n\r\n", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n", b"Upgrade: h2c\r\n"),
            *(b"Expect: 100-continue\r\n", b"Sec-WebSocket-Key: x\r\n", b"Sec-WebSocket-Version: 13\r\n"),
        ]
    ),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(_SOUP, min_size=1, max_size=12), st.integers(1, 40))
def test_the_worker_outlives_any_bytes(own_proxy: LiveProxy, soup: list[bytes], split: int) -> None:
    pids = own_proxy.worker_pids
    data = b"".join(soup)
    with RawClient(own_proxy) as client:
        try:
            for at in range(0, len(data), split):
                client.send(data[at : at + split])
        except ConnectionError:
            pass
    assert own_proxy.get("/healthz").status_code == 200
    assert own_proxy.worker_pids == pids
    assert "the application failed" not in own_proxy.log
    assert "Traceback" not in own_proxy.log, own_proxy.log[-3000:]


# Bounds


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
    wait_for(lambda: strict_proxy.get("/v1/models").status_code == 200)


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
        wait_for(lambda: len(upstream.requests) == 6 + 2)
        go_on.open()
        assert sorted(client.answer().status for client in clients) == [200, 200, 503, 503, 503, 503]
    upstream.script = answer_at_once
    wait_for(lambda: strict_proxy.get("/v1/models").status_code == 200)


async def answer_at_once(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer()


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


# Start, stop, restart


def streaming_script(first_seen: Gate, go_on: Gate) -> object:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events({"number": 1}, done=False)
        first_seen.open()
        await go_on.wait(300)
        await exchange.events({"number": 2})
        await exchange.end_stream()

    return script


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
    except ConnectionError:
        return True
    return False


def wait_for(condition: object, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_may_finish_when_the_process_is_told_to_stop(
    upstream: FakeUpstream, sig: signal.Signals
) -> None:
    first_seen, go_on = Gate(), Gate()
    upstream.script = streaming_script(first_seen, go_on)  # type: ignore[assignment]
    with LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions") as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == b'data: {"number": 1}\n\n'
            assert proxy.process is not None
            proxy.process.send_signal(sig)
            wait_for(lambda: refuses_connections(proxy.port))
            go_on.open()
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
        assert proxy.process.wait(PATIENCE_S) == 0


def test_a_stream_that_does_not_finish_in_time_ends_visibly_cut(upstream: FakeUpstream) -> None:
    first_seen, go_on = Gate(), Gate()
    upstream.script = streaming_script(first_seen, go_on)  # type: ignore[assignment]
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="1") as proxy, RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        assert first_seen.wait_in_thread()
        client.read_until(b"\n\n")
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        rest = client.read_to_end()
        stopping.join()
    assert b'"code": "gateway_restarting"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    go_on.open()


@pytest.mark.parametrize("is_connected", [True, False])
def test_a_request_that_still_waits_when_the_process_stops_is_told_so_and_recorded(
    upstream: FakeUpstream, is_connected: bool
) -> None:
    asked, go_on = Gate(), Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        asked.open()
        await go_on.wait()

    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="1") as proxy:
        if is_connected:
            assert proxy.get("/v1/models").status_code == 200
        upstream.script = script
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", body=b"{}")
            assert asked.wait_in_thread()
            stopping = threading.Thread(target=proxy.stop)
            stopping.start()
            answer = client.answer()
            stopping.join()
        go_on.open()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "gateway_restarting")
        proxy.start()
        records = proxy.wait_for_rows("SELECT status, outcome FROM billing_usagerecord ORDER BY started_at", 1)
        assert records[-1] == (503, "timeout")


def test_a_reload_drops_nothing(upstream: FakeUpstream) -> None:
    stop = threading.Event()
    statuses: list[int] = []
    failures: list[Exception] = []

    def keep_asking(url: str) -> None:
        with new_client() as client:
            while not stop.is_set():
                try:
                    statuses.append(client.post(f"{url}/v1/chat/completions", json={}).status_code)
                except httpx.HTTPError as exc:
                    failures.append(exc)

    first_seen, go_on = Gate(), Gate()
    # Longer than a busy machine may take to start the new worker.
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="300") as proxy:
        upstream.script = streaming_script(first_seen, go_on)  # type: ignore[assignment]
        with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions", timeout=300) as stream:
            chunks = stream.iter_raw()
            next(chunks)
            upstream.script = answer_at_once
            old = proxy.worker_pids
            threads = [threading.Thread(target=keep_asking, args=(proxy.url,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            wait_for(lambda: len(statuses) > 50)
            assert proxy.process is not None
            proxy.process.send_signal(signal.SIGHUP)
            wait_for(lambda: set(proxy.worker_pids) - set(old))
            asked_before = len(statuses)
            wait_for(lambda: len(statuses) > asked_before + 200)
            go_on.open()
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
            wait_for(lambda: not set(proxy.worker_pids) & set(old))
            asked_before = len(statuses)
            wait_for(lambda: len(statuses) > asked_before + 50)
            stop.set()
            for thread in threads:
                thread.join()
    assert not failures
    assert set(statuses) == {200}


def test_a_fresh_start_makes_secrets_that_only_the_owner_reads(own_proxy: LiveProxy) -> None:
    for name in ("secret_key", "key_pepper"):
        path = own_proxy.var_dir / name
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.read_text()) >= 32
    assert own_proxy.var_dir.stat().st_mode & 0o077 == 0


def test_the_first_operators_password_is_printed_once(own_proxy: LiveProxy) -> None:
    assert "First operator: admin / " in own_proxy.setup_output
    assert own_proxy.manage("setup") == ""
    assert own_proxy.setup_output.split(" / ")[1].split()[0] not in own_proxy.log


@pytest.mark.parametrize("has_sandbox", [True, False])
def test_the_line_that_is_printed_works_at_once(upstream: FakeUpstream, has_sandbox: bool) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, SANDBOX_ENABLED=str(has_sandbox)) as proxy:
        proxy.stop()
        environment = proxy.environment | {"OPENAI_API_KEY": "sk-of-the-shell"}
        serve = [sys.executable, "manage.py", "serve"]
        with subprocess.Popen(serve, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as serving:
            assert serving.stdout is not None
            line = next(line for line in serving.stdout if b"curl -N" in line)
            answer = subprocess.run(line, shell=True, env=environment, capture_output=True, timeout=240)
            serving.terminate()
    assert answer.returncode == 0
    if has_sandbox:
        assert answer.stdout.endswith(b"data: [DONE]\n\n")
        assert not upstream.requests
    else:
        assert "Bearer sk-of-the-shell" in [value for _, value in upstream.requests[0].headers]


def test_instances_run_side_by_side(own_proxy: LiveProxy, upstream: FakeUpstream, tmp_path: Path) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, var_dir=tmp_path, WORKERS="2") as second:
        assert len(second.worker_pids) == 2
        assert second.get("/v1/models").status_code == 200
        assert own_proxy.get("/v1/models").status_code == 200
    assert (tmp_path / "secret_key").read_text() != (own_proxy.var_dir / "secret_key").read_text()


def test_a_wrong_setting_stops_the_start_and_is_named(tmp_path: Path) -> None:
    for name, value in [("PORT", "99999"), ("WORKERS", "many"), ("UPSTREAM_URL", "ftp://x"), ("DEBUG", "maybe")]:
        with pytest.raises(RuntimeError, match=name), LiveProxy(var_dir=tmp_path, **{name: value}):
            pass


def test_the_file_descriptor_limit_is_raised(own_proxy: LiveProxy) -> None:
    limits = Path(f"/proc/{own_proxy.worker_pids[0]}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
    assert soft == hard
    assert os.getpid() not in own_proxy.worker_pids
