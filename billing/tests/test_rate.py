"""Limits of questions about balances while the cache that counts them is away."""

from __future__ import annotations

import time
from pathlib import Path

import redis

from gateway.tests.live import LiveProxy
from gateway.tests.redis_server import running_redis

BEARER = {"authorization": "Bearer sk-asks-often-0000000001"}


def test_nobody_waits_for_a_redis_that_does_not_answer(tmp_path: Path) -> None:
    with (
        running_redis(tmp_path) as url,
        LiveProxy(REDIS_URL=url, BALANCE_RATE_PER_MINUTE="2") as proxy,
        redis.Redis.from_url(url) as client,
    ):
        statuses = [proxy.get("/pro/balance", headers=BEARER).status_code for _ in range(5)]
        assert 429 in statuses
        client.client_pause(15_000)
        began_s = time.monotonic()
        statuses = [proxy.get("/pro/balance", headers=BEARER).status_code for _ in range(6)]
        assert set(statuses) == {404}
        # Two seconds each where each of them waits.
        assert time.monotonic() - began_s < 10
        assert "requests for balances are not limited" in proxy.log
        deadline = time.monotonic() + 60
        while proxy.get("/pro/balance", headers=BEARER).status_code != 429:
            assert time.monotonic() < deadline
