"""Limits through the live proxy, counted in memory and in a real Redis: who is refused, how, and before whom."""

from __future__ import annotations

import contextlib
import time

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.limited import (
    CHAT,
    COST,
    DRY,
    FEW,
    FREE,
    RETRIED,
    STREAMS,
    TALKS,
    TOKENS,
    answer,
    ask,
    error_of,
    metric,
    spent_by,
)
from gateway.tests.live import LiveProxy, new_client, wait_until


@pytest.fixture
def upstream(answering_upstream: FakeUpstream) -> FakeUpstream:
    return answering_upstream


@pytest.fixture
def proxy(limited: LiveProxy) -> LiveProxy:
    return limited


# By the minute


def test_the_request_after_the_last_is_refused_before_the_upstream_hears_of_it(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    refused_before = metric(proxy, 'proxysite_limit_refusals_total{reason="requests",scope="key"}')
    began_s = time.monotonic()
    assert [ask(proxy, FEW).status_code for _ in range(3)] == [200] * 3
    refused = ask(proxy, FEW)
    least_s = 19 - (time.monotonic() - began_s)
    assert error_of(refused) == (429, "requests", "rate_limit_exceeded")
    assert least_s <= int(refused.headers["retry-after"]) <= 20
    assert least_s * 1000 - 1 <= int(refused.headers["retry-after-ms"]) <= 20_000
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert refused.headers["access-control-allow-origin"] == "*"
    assert len(upstream.requests) == 3
    assert ask(proxy, FREE).status_code == 200
    # What another worker has counted is told every second.
    name = 'proxysite_limit_refusals_total{reason="requests",scope="key"}'
    wait_until(lambda: metric(proxy, name) == refused_before + 1)


def test_the_official_sdk_raises_and_tries_again_when_it_is_told_to(proxy: LiveProxy) -> None:
    client = OpenAI(api_key=RETRIED, base_url=f"{proxy.url}/v1", max_retries=0, timeout=60)

    def ask_often() -> None:
        # A little more than sixty times, if it takes no longer than some seconds: one comes back each second.
        for _ in range(1000):
            client.chat.completions.create(**CHAT)

    with pytest.raises(openai.RateLimitError) as raised:
        ask_often()
    assert raised.value.code == "rate_limit_exceeded"
    assert raised.value.response.headers["retry-after"] == "1"
    patient = client.with_options(max_retries=2)
    assert patient.chat.completions.create(**CHAT).model == "gpt-4o-mini"


def test_tokens_are_counted_by_what_may_be_used_and_then_by_what_was(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    refused = ask(proxy, TOKENS, json={"max_tokens": 5000})
    assert error_of(refused) == (429, "tokens", "rate_limit_exceeded")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    assert not upstream.requests
    began_s = time.monotonic()
    assert ask(proxy, TOKENS, json={"max_tokens": 50}).status_code == 200  # and uses 600
    wait_until(lambda: spent_by(proxy, TOKENS) == COST)  # and so the other worker knows of it, too
    refused = ask(proxy, TOKENS, json={"max_tokens": 800})
    back = (time.monotonic() - began_s) * 1000 / 60
    assert error_of(refused) == (429, "tokens", "rate_limit_exceeded")
    assert refused.headers["x-ratelimit-limit-tokens"] == "1000"
    assert 380 <= int(refused.headers["x-ratelimit-remaining-tokens"]) <= 400 + back
    assert len(upstream.requests) == 1


# At once


def test_streams_at_once_are_free_again_when_they_end_and_when_their_clients_leave(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    gate = Gate()

    async def held(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events({"choices": []}, done=False)
        await gate.wait()
        await exchange.events()
        await exchange.end_stream()

    upstream.script = held
    with new_client() as client, contextlib.ExitStack() as open_streams:

        def stream() -> httpx.Response:
            return open_streams.enter_context(
                client.stream(
                    "POST",
                    f"{proxy.url}/v1/chat/completions",
                    json=CHAT | {"stream": True},
                    headers={"authorization": f"Bearer {STREAMS}"},
                )
            )

        first = stream()
        assert first.status_code == 200
        assert stream().status_code == 200
        refused = ask(proxy, STREAMS)
        assert error_of(refused) == (429, "requests", "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-limit-streams"] == "2"
        assert refused.headers["x-ratelimit-remaining-streams"] == "0"
        assert refused.headers["x-ratelimit-reset-streams"] == "1s"
        first.close()
        upstream.script = answer
        wait_until(lambda: ask(proxy, STREAMS).status_code == 200)
        gate.open()
    wait_until(lambda: [ask(proxy, STREAMS).status_code for _ in range(3)] == [200] * 3)


# Elsewhere than on /v1


def test_a_conversation_has_the_same_limits_in_its_own_form(proxy: LiveProxy) -> None:
    body = {"apiKey": TALKS, "sessionId": "s", "content": "hello"}
    proxy.post("/pro/chat/completions", json=body)
    refused = proxy.post("/pro/chat/completions", json=body)
    assert refused.status_code == 429
    assert refused.json()["code"] == 429
    assert refused.json()["data"] is None
    assert int(refused.headers["retry-after"]) > 1
    assert refused.headers["x-ratelimit-limit-requests"] == "1"
    assert refused.json()["message"].startswith("已达到该密钥或您的网络地址的用量限制")
    refused = proxy.post("/pro/chat/completions", json=body, headers={"Accept-Language": "en"})
    assert "requests per min (RPM): limit 1" in refused.json()["message"]
    refused = proxy.post("/pro/chat/completions", json=body | {"apiKey": DRY})
    assert refused.status_code == 429
    assert refused.json()["message"].startswith("该密钥或您的网络地址本月的消费额度已用完")
