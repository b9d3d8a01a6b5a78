"""A clock that jumps while a worker counts limits in its memory; with Redis, `bench.chaos` has it jump."""

from __future__ import annotations

import time

import pytest

from bench.clock import ShiftedClock, can_shift
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.limited import decide, limited_proxy
from gateway.tests.live import LiveProxy

EARLY, AHEAD, LATE = "sk-decided-before-001", "sk-decided-ahead-0001", "sk-decided-after-0001"
AN_HOUR_S = 3600


async def answer(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer(b'{"data": []}')


def ask(proxy: LiveProxy, api_key: str) -> int:
    return proxy.get("/v1/models", headers={"authorization": f"Bearer {api_key}"}).status_code


def wait_until_limited(proxy: LiveProxy, api_key: str) -> None:
    deadline = time.monotonic() + 30
    while ask(proxy, api_key) != 429:
        assert time.monotonic() < deadline, "what was decided is not known"


@pytest.mark.skipif(not can_shift(), reason="no compiler")
def test_a_clock_that_jumps_refuses_nobody_and_hides_no_decision() -> None:
    with (
        FakeUpstream(answer) as upstream,
        ShiftedClock() as clock,
        limited_proxy(
            {EARLY: {"requests_per_minute": 1000}}, UPSTREAM_URL=upstream.url, REDIS_URL="", **clock.environment
        ) as proxy,
    ):
        assert ask(proxy, EARLY) == 200
        clock.set(AN_HOUR_S)
        assert ask(proxy, EARLY) == 200
        decide(proxy, {AHEAD: {"requests_per_minute": 1}})
        wait_until_limited(proxy, AHEAD)
        clock.set(0)
        assert ask(proxy, EARLY) == 200
        decide(proxy, {LATE: {"requests_per_minute": 1}})
        wait_until_limited(proxy, LATE)
