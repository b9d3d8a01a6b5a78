"""Streams and sessions in progress while Redis is away, where nothing may pass uncounted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.limited import limited_proxy
from gateway.tests.redis_server import running_redis
from gateway.tests.test_limiter import streamed

KEY = "sk-plenty-0000000001"


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[redis.Redis]:
    with running_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        yield client


def url_of(client: redis.Redis) -> str:
    return f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


SETTINGS = {"LIMITS_TIMEOUT_SECONDS": "0.05", "ON_LIMITS_UNAVAILABLE": "refuse", "RESERVE_OUTPUT_TOKENS": "500"}
DECIDED: dict[str, dict[str, Any]] = {KEY: {"monthly_usd": "1000"}}


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
