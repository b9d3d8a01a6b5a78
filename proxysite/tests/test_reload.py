"""A reload: old workers serve their streams to the end, however long those run, unless the process is told to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import PATIENCE_S, LiveProxy
from gateway.tests.raw_client import RawClient

GRACE_S = 1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def reload(proxy: LiveProxy) -> None:
    """Return when a new worker serves, the old ones have been told to end, and the time of a stop is over."""
    old = set(proxy.worker_pids)
    ended_before, begun_before = proxy.log.count("Shutting down"), proxy.log.count("Application startup complete")
    assert proxy.process is not None
    proxy.process.send_signal(signal.SIGHUP)
    wait_for(lambda: bool(set(proxy.worker_pids) - old))
    wait_for(lambda: proxy.log.count("Application startup complete") > begun_before)
    wait_for(lambda: proxy.log.count("Shutting down") > ended_before)
    told_at = time.monotonic()
    wait_for(lambda: time.monotonic() > told_at + 2 * GRACE_S)


def begin_stream(client: RawClient, upstream: FakeUpstream) -> Gate:
    """Return what lets the stream end, once its first event is here."""
    go_on = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events({"number": 1}, done=False)
        await go_on.wait(300)
        await exchange.events({"number": 2})
        await exchange.end_stream()

    upstream.script = script
    client.request("POST", "/v1/chat/completions", body=b"{}")
    client.read_until(b'data: {"number": 1}\n\n')
    return go_on


def test_streams_outlive_several_reloads_by_more_than_the_time_of_a_stop(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS=str(GRACE_S)) as proxy:
        with RawClient(proxy) as first:
            first_goes_on = begin_stream(first, upstream)
            (oldest,) = proxy.worker_pids
            reload(proxy)
            with RawClient(proxy) as second:
                second_goes_on = begin_stream(second, upstream)
                reload(proxy)
                assert oldest in proxy.worker_pids
                assert len(proxy.worker_pids) == 3
                for client, go_on in ((first, first_goes_on), (second, second_goes_on)):
                    go_on.open()
                    assert client.read_until(b"0\r\n\r\n").endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        wait_for(lambda: len(proxy.worker_pids) == 1)
        assert oldest not in proxy.worker_pids
        assert "was sent SIG" not in proxy.log


def test_the_old_worker_takes_connections_until_the_new_one_does() -> None:
    with LiveProxy() as proxy:
        old = set(proxy.worker_pids)
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGHUP)
        wait_for(lambda: bool(set(proxy.worker_pids) - old))
        (new,) = set(proxy.worker_pids) - old
        os.kill(new, signal.SIGSTOP)  # as slow in starting as can be
        assert proxy.log.count("Application startup complete") == 1
        # Longer than the master takes to look after its workers once.
        stopped_at = time.monotonic()
        while time.monotonic() < stopped_at + 3:
            assert proxy.get("/healthz").status_code == 200
        os.kill(new, signal.SIGCONT)
        wait_for(lambda: proxy.worker_pids == [new])
        assert proxy.get("/healthz").status_code == 200


def test_a_new_worker_that_cannot_start_leaves_the_old_one_serving(tmp_path: Path) -> None:
    certificates = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(certificates))
    with LiveProxy(UPSTREAM_CA_FILE=str(certificates)) as proxy:
        old = proxy.worker_pids
        good = certificates.read_text()
        certificates.write_text("no certificate")
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "Worker failed to boot. Those before it go on." in proxy.log)
        assert proxy.worker_pids == old
        assert proxy.get("/healthz").status_code == 200
        certificates.write_text(good)
        proxy.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not set(old) & set(proxy.worker_pids))
        assert proxy.get("/healthz").status_code == 200


def test_a_session_outlives_a_reload_by_more_than_the_time_of_a_stop() -> None:
    with (
        RealtimeUpstream() as upstream,
        LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS=str(GRACE_S)) as proxy,
        connect(f"ws://127.0.0.1:{proxy.port}/v1/realtime") as client,
    ):
        client.send("before")
        assert client.recv() == "before"
        reload(proxy)
        client.send("after")
        assert client.recv() == "after"
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        with pytest.raises(ConnectionClosed) as end:
            client.recv(PATIENCE_S)
        stopping.join()
        assert end.value.rcvd is not None
        assert end.value.rcvd.code == 1012


def test_a_stop_ends_the_streams_that_a_reload_has_left(upstream: FakeUpstream) -> None:
    with (
        LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS=str(GRACE_S)) as proxy,
        RawClient(proxy) as client,
    ):
        go_on = begin_stream(client, upstream)
        reload(proxy)
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        rest = client.read_to_end()
        stopping.join()
        go_on.open()
    assert b'"code": "gateway_restarting"' in rest
    assert not rest.endswith(b"0\r\n\r\n")


def test_a_worker_that_dies_is_replaced_while_an_old_one_still_serves(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url) as proxy, RawClient(proxy) as client:
        go_on = begin_stream(client, upstream)
        old = proxy.worker_pids
        reload(proxy)
        (new,) = set(proxy.worker_pids) - set(old)
        os.kill(new, signal.SIGKILL)
        wait_for(lambda: bool(set(proxy.worker_pids) - {*old, new}))
        assert proxy.get("/healthz").status_code == 200
        go_on.open()
        client.read_until(b"0\r\n\r\n")


def test_ctrl_c_gives_an_old_worker_its_time_too(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="300") as proxy, RawClient(proxy) as client:
        go_on = begin_stream(client, upstream)
        reload(proxy)
        assert proxy.process is not None
        os.killpg(proxy.process.pid, signal.SIGINT)  # as a terminal does: the master and every worker
        wait_for(lambda: proxy.log.count("Shutting down") == 2)
        go_on.open()
        assert client.read_until(b"0\r\n\r\n").endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert proxy.process.wait(PATIENCE_S) == 0
