"""Money to the last cent through the live proxy, counted in memory and in a real Redis."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal

import httpx2 as httpx
import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.limited import (
    CENT,
    CHAT,
    COST,
    DRY,
    LONG,
    USAGE,
    ask,
    error_of,
    limited_proxy,
    metric,
    spent_by,
    streamed,
    wait_until_counting,
)
from gateway.tests.live import LiveProxy, wait_until

PATIENT = "sk-long-patient-0001"


@pytest.fixture
def upstream(answering_upstream: FakeUpstream) -> FakeUpstream:
    return answering_upstream


@pytest.fixture
def proxy(limited: LiveProxy) -> LiveProxy:
    return limited


async def ramble(exchange: Exchange) -> None:
    """Stream words until nobody listens, or 200,000 have been said."""
    await exchange.read_body()
    await exchange.start_stream()
    piece = b"".join(
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": f"word {number} "}}]}).encode() + b"\n\n"
        for number in range(100)
    )
    for _ in range(2000):
        await exchange.chunk(piece)
    await exchange.events({"choices": [], "usage": USAGE})
    await exchange.end_stream()


def test_two_hundred_at_once_on_the_last_cent_do_not_overshoot(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def run() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        headers = {"authorization": f"Bearer {CENT}"}
        async with httpx.AsyncClient(
            trust_env=False, verify=False, timeout=60, limits=limits, headers=headers
        ) as client:

            async def one() -> int:
                answer = await client.post(f"{proxy.url}/v1/chat/completions", json=CHAT | {"max_tokens": 500})
                return answer.status_code

            return await asyncio.gather(*(one() for _ in range(200)))

    statuses = asyncio.run(run())
    passed = statuses.count(200)
    assert set(statuses) == {200, 429}
    assert len(upstream.requests) == passed
    assert 1 <= passed <= 31  # of 0.000315 each
    # What was reserved too much is free again, and the rest can be spent, but no more.
    while ask(proxy, CENT, json={"max_tokens": 500}).status_code == 200:
        passed += 1
    assert passed in (30, 31)
    wait_until(lambda: spent_by(proxy, CENT) == passed * COST)
    assert spent_by(proxy, CENT) <= Decimal("0.01")
    refused = ask(proxy, CENT, json={"max_tokens": 500})
    assert error_of(refused) == (429, "insufficient_quota", "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["retry-after"]) > 0
    assert proxy.get("/v1/models", headers={"authorization": f"Bearer {CENT}"}).status_code == 200


def test_a_restart_forgets_nothing(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    while ask(proxy, CENT, json={"max_tokens": 500}).status_code == 200:
        pass
    proxy.stop()
    proxy.start()
    wait_until_counting(proxy)
    assert ask(proxy, CENT, json={"max_tokens": 500}).status_code == 429


def test_a_stream_is_cut_where_its_money_ends(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = ramble
    received, is_cut = streamed(proxy, LONG)
    assert is_cut
    assert b'event: error\ndata: {"error"' in received
    assert b'"insufficient_quota"' in received
    # The key has one cent, which buys 16,667 tokens that are written.
    wait_until(lambda: spent_by(proxy, LONG) > Decimal("0.001"))
    assert spent_by(proxy, LONG) <= Decimal("0.01")
    wait_until(lambda: metric(proxy, 'proxysite_limit_refusals_total{reason="cut",scope="key"}') >= 1)


def test_a_request_that_may_cost_too_much_or_nobody_knows_what_is_refused(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    assert error_of(ask(proxy, DRY, json={"max_tokens": 500})) == (429, "insufficient_quota", "insufficient_quota")
    assert error_of(ask(proxy, DRY, json={"model": "nobody-knows-it"})) == (
        403,
        "invalid_request_error",
        "model_unpriced",
    )
    assert not upstream.requests
    assert ask(proxy, DRY, json={"max_tokens": 5}).status_code == 200


# Where nobody is to be cut off


async def ramble_dearly(exchange: Exchange) -> None:
    """Stream what costs twelve times a cent, and say so at its end."""
    await exchange.read_body()
    await exchange.start_stream()
    for number in range(2000):
        await exchange.events(
            {"choices": [{"index": 0, "delta": {"content": "word " * 100 + str(number)}}]}, done=False
        )
    await exchange.events({"choices": [], "usage": USAGE | {"completion_tokens": 200_000}})
    await exchange.end_stream()


def test_a_stream_is_not_cut_where_that_is_not_wanted_and_is_the_last_one(
    uncut_store: dict[str, str], upstream: FakeUpstream
) -> None:
    upstream.script = ramble_dearly
    decided = {PATIENT: {"monthly_usd": "0.0100000"}}
    with limited_proxy(decided, UPSTREAM_URL=upstream.url, **uncut_store) as proxy:
        received, is_cut = streamed(proxy, PATIENT)
        assert not is_cut
        assert received.endswith(b"data: [DONE]\n\n")
        assert b"event: error" not in received
        # All of it is counted, above the limit too, so that nothing follows.
        wait_until(lambda: spent_by(proxy, PATIENT) == Decimal("0.120015"))
        assert error_of(ask(proxy, PATIENT, json={"max_tokens": 1})) == (
            429,
            "insufficient_quota",
            "insufficient_quota",
        )
        assert metric(proxy, 'proxysite_limit_refusals_total{reason="cut",scope="key"}') == 0
        assert len(upstream.requests) == 1
