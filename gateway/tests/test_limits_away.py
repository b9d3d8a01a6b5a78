"""Limits without Redis, and with one that is away: requests, and streams and sessions in progress."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.limited import CHAT, FREE, ask, limited_proxy, metric, streamed, wait_until_counting
from gateway.tests.live import ROOT, LiveProxy, free_port, new_client, wait_until
from gateway.tests.redis_server import needs_redis, running_redis

KEY = "sk-plenty-0000000001"
SETTINGS = {"LIMITS_TIMEOUT_SECONDS": "0.05", "ON_LIMITS_UNAVAILABLE": "refuse", "RESERVE_OUTPUT_TOKENS": "500"}
DECIDED: dict[str, dict[str, Any]] = {KEY: {"monthly_usd": "1000"}}


@pytest.fixture
def upstream(answering_upstream: FakeUpstream) -> FakeUpstream:
    return answering_upstream


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[redis.Redis]:
    with running_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        yield client


def url_of(client: redis.Redis) -> str:
    return f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


# Requests, without Redis and with one that is away


def test_several_workers_with_limits_and_no_redis_are_refused_at_start(module_upstream: FakeUpstream) -> None:
    proxy = LiveProxy(WORKERS="2", REDIS_URL="", KEY_REQUESTS_PER_MINUTE="5", DATABASE_URL="")
    with contextlib.ExitStack() as stack:
        stack.callback(proxy.__exit__)
        command = [sys.executable, "manage.py", "serve"]
        done = subprocess.run(command, cwd=ROOT, env=proxy.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode != 0
        assert "(gateway.E001) 2 workers would each count for themselves" in done.stderr
        environment = proxy.environment | {"KEY_REQUESTS_PER_MINUTE": "0", "ALLOWED_MODELS": "gpt-4o"}
        proxy.environment = environment
        proxy.manage("setup")
        proxy.start()  # what needs no counting holds in any number of workers
        assert ask(proxy, FREE, json={"model": "x"}).status_code == 403


class Switch:
    """Stands before Redis: passes on, or takes everything and says nothing."""

    def __init__(self) -> None:
        self.is_silent = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._server.getsockname()[1]}/9"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", 6379))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.is_silent:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


@needs_redis
@pytest.mark.parametrize("wish", ["allow", "refuse"])
def test_a_redis_that_falls_silent_is_no_outage_unless_that_is_wanted(upstream: FakeUpstream, wish: str) -> None:
    switch = Switch()
    settings = {"REDIS_URL": switch.url, "ON_LIMITS_UNAVAILABLE": wish, "KEY_REQUESTS_PER_MINUTE": "5"}
    with LiveProxy(UPSTREAM_URL=upstream.url, **settings) as proxy, new_client() as client:

        def timed() -> tuple[int, float]:
            began = time.perf_counter()
            headers = {"authorization": f"Bearer {FREE}"}
            status = client.post(f"{proxy.url}/v1/chat/completions", json=CHAT, headers=headers).status_code
            return status, time.perf_counter() - began

        wait_until_counting(proxy)
        assert [timed()[0] for _ in range(6)] == [200] * 5 + [429]
        switch.is_silent = True
        found = [timed() for _ in range(20)]
        assert {status for status, _ in found} == {200 if wish == "allow" else 503}
        # Three times 50 ms, and then nothing; a busy machine's own pace comes on top. Redis's silence would cost more.
        assert sum(took for _, took in found) < 15
        wait_until(lambda: metric(proxy, "proxysite_limits_away") == 1)
        assert metric(proxy, "proxysite_limit_uncounted_requests_total") >= 20
        wait_until(lambda: bool(proxy.rows("SELECT 1 FROM gateway_workerstate WHERE limits_away")))
        assert metric(proxy, "proxysite_limits_away") == 1
        switch.is_silent = False
        wait_until(lambda: metric(proxy, "proxysite_limits_away") == 0)
        wait_until(lambda: timed()[0] == 429)
    switch.close()


def test_a_redis_that_is_not_there_at_start_is_no_outage(upstream: FakeUpstream) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    with LiveProxy(UPSTREAM_URL=upstream.url, REDIS_URL=url, KEY_REQUESTS_PER_MINUTE="1") as proxy:
        assert [ask(proxy, FREE).status_code for _ in range(3)] == [200] * 3
        assert metric(proxy, "proxysite_limits_away") == 1


# In progress, where nothing may pass uncounted


@pytest.mark.parametrize("pause_ms", [1_000, 600_000])
def test_a_stream_waits_for_a_redis_that_pauses_and_is_told_if_that_does_not_come_back(
    own_redis: redis.Redis, pause_ms: int
) -> None:
    async def ramble(exchange: Exchange) -> None:
        """Say a word, and after a pause twice as much as is reserved."""
        await exchange.read_body()
        await exchange.start_stream()
        word = {"choices": [{"index": 0, "delta": {"content": " word"}}]}
        await exchange.events(word, done=False)
        own_redis.client_pause(pause_ms)
        await exchange.events(*[word] * 1000)
        await exchange.end_stream()

    with (
        FakeUpstream(ramble) as upstream,
        limited_proxy(DECIDED, UPSTREAM_URL=upstream.url, REDIS_URL=url_of(own_redis), **SETTINGS) as proxy,
    ):
        received, is_cut = streamed(proxy, KEY)
    assert is_cut == (pause_ms > 1_000)
    assert received.endswith(b"data: [DONE]\n\n") or b'"code": "limits_unavailable"' in received
    assert b"insufficient_quota" not in received


@pytest.mark.parametrize("pause_ms", [1_000, 600_000])
async def test_a_session_waits_for_a_redis_that_pauses_and_is_told_if_that_does_not_come_back(
    own_redis: redis.Redis, pause_ms: int
) -> None:
    async def responses(websocket: Any) -> None:
        async for _ in websocket:
            own_redis.client_pause(pause_ms)
            usage = {"input_tokens": 0, "output_tokens": 5}
            await websocket.send(json.dumps({"type": "response.done", "response": {"id": "r", "usage": usage}}))

    with RealtimeUpstream() as upstream:
        upstream.play(responses)
        with limited_proxy(DECIDED, UPSTREAM_URL=upstream.url, REDIS_URL=url_of(own_redis), **SETTINGS) as proxy:
            url = f"{proxy.url.replace('http', 'ws')}/v1/realtime?model=gpt-realtime"
            headers = {"authorization": f"Bearer {KEY}"}
            async with connect(url, additional_headers=headers, proxy=None, open_timeout=60) as websocket:
                await websocket.send(json.dumps({"type": "response.create"}))
                assert json.loads(await websocket.recv())["type"] == "response.done"
                if pause_ms > 1_000:
                    assert json.loads(await websocket.recv())["error"]["code"] == "limits_unavailable"
                    with pytest.raises(ConnectionClosed):
                        await websocket.recv()
