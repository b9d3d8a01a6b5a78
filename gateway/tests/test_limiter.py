"""Limits through the live proxy, counted in memory and in a real Redis: who is refused, how, and before whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.limited import limited_proxy, spent_by, wait_until_counting
from gateway.tests.live import ROOT, LiveProxy, free_port, new_client
from gateway.tests.test_limits import REDIS_URL, needs_redis

FEW, TOKENS, STREAMS = "sk-few-requests-00001", "sk-few-tokens-000001", "sk-streams-000000001"
MODELS = "sk-some-models-000001"
NETWORKS = "sk-some-networks-0001"
CENT, LONG, DRY = "sk-last-cent-00000001", "sk-long-stream-000001", "sk-dry-0000000000001"
FREE = "sk-without-limits-001"
RETRIED = "sk-retried-0000000001"
TALKS = "sk-talks-00000000001"
DECIDED: dict[str, dict[str, Any]] = {
    FEW: {"requests_per_minute": 3},
    RETRIED: {"requests_per_minute": 60},
    TOKENS: {"tokens_per_minute": 1000},
    STREAMS: {"concurrent_streams": 2},
    MODELS: {"allowed_models": "gpt-4o-mini\no3*"},
    NETWORKS: {"allowed_networks": "192.0.2.0/24\n2001:db8::/32"},
    CENT: {"monthly_usd": "0.0100000"},
    LONG: {"monthly_usd": "0.0100000"},
    DRY: {"monthly_usd": "0.0001000"},
    TALKS: {"requests_per_minute": 1},
}
CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
# gpt-4o-mini costs 0.15 and 0.60 USD per million tokens.
USAGE = {"prompt_tokens": 100, "completion_tokens": 500, "total_tokens": 600}
COST = Decimal("0.000315")


async def answer(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer(json.dumps({"model": "gpt-4o-mini", "choices": [], "usage": USAGE}).encode())


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


@pytest.fixture(scope="module")
def module_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def upstream(module_upstream: FakeUpstream) -> FakeUpstream:
    module_upstream.script = answer
    module_upstream.requests.clear()
    return module_upstream


@pytest.fixture(scope="module", params=["memory", pytest.param("redis", marks=needs_redis)])
def _proxy(request: pytest.FixtureRequest, module_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    shared = (
        {"REDIS_URL": "", "WORKERS": "1"} if request.param == "memory" else {"REDIS_URL": REDIS_URL, "WORKERS": "2"}
    )
    settings = {"SANDBOX_ENABLED": "true", "RESERVE_OUTPUT_TOKENS": "1000"}
    with limited_proxy(DECIDED, UPSTREAM_URL=module_upstream.url, **shared, **settings) as proxy:
        yield proxy


@pytest.fixture
def proxy(_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    return _proxy


def ask(proxy: LiveProxy, api_key: str, **more: Any) -> httpx.Response:
    options: dict[str, Any] = {"json": CHAT | more.pop("json", {})} | more
    headers = {"authorization": f"Bearer {api_key}"} | options.pop("headers", {})
    return proxy.post(options.pop("path", "/v1/chat/completions"), headers=headers, **options)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"]


def metric(proxy: LiveProxy, line: str) -> float:
    for text in proxy.get("/metrics").text.splitlines():
        if text.startswith(line):
            return float(text.rpartition(" ")[2])
    return 0.0


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


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Models and networks


def test_models_that_a_key_may_not_use_are_refused(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    assert ask(proxy, MODELS).status_code == 200
    assert ask(proxy, MODELS, json={"model": "o3-pro"}).status_code == 200
    for body in ({"model": "gpt-4o"}, {"model": ""}, {"model": None}, {"model": ["gpt-4o-mini"]}):
        assert error_of(ask(proxy, MODELS, json=body)) == (403, "invalid_request_error", "model_not_allowed")
    assert len(upstream.requests) == 2
    with pytest.raises(openai.PermissionDeniedError):
        OpenAI(api_key=MODELS, base_url=f"{proxy.url}/v1").chat.completions.create(**CHAT | {"model": "gpt-4o"})
    headers = {"authorization": f"Bearer {MODELS}"}
    assert proxy.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "gpt-4o-mini", "model": "gpt-4o"}',
        b'{"mod\\u0065l": "gpt-4o"}',
        b'{"x": {"model": "gpt-4o-mini"}, "model": "gpt-4o"}',
        b"\xef\xbb\xbf" + b'{"x": "gpt-4o-mini", "model": "gpt-4o"}',
        b'{"model": "gpt-4o-mini"',
        b"[]",
        b"",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1//chat/./completions", "/v1/videos", "/v1/batches"])
def test_no_spelling_of_a_body_or_path_gets_another_model(
    proxy: LiveProxy, upstream: FakeUpstream, body: bytes, path: str
) -> None:
    headers = {"authorization": f"Bearer {MODELS}", "content-type": "application/json"}
    response = proxy.post(path, content=body, headers=headers)
    assert response.status_code in (400, 403)
    assert not upstream.requests


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = [
        b"--b\r\ncontent-disposition: form-data; %b\r\n\r\n%b\r\n" % (name.encode(), value) for name, value in fields
    ]
    return b"".join(parts) + b"--b--\r\n"


FILE = ('name="file"; filename="a.mp3"', b"\0" * 300_000)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([('name="model"', b"gpt-4o-mini"), FILE], 200),
        ([FILE, ('name="model"', b"gpt-4o-mini")], 200),
        ([FILE, ('name="model"', b"whisper-1")], 403),
        ([FILE], 403),
        ([('name="model"', b"gpt-4o-mini"), FILE, ('name="model"', b"whisper-1")], 403),
        ([('name="model"', b"gpt-4o-mini"), FILE, ("name=model", b"whisper-1")], 403),
    ],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_model_of_a_form_is_seen_wherever_it_stands(
    proxy: LiveProxy, upstream: FakeUpstream, fields: Any, status: int, is_chunked: bool
) -> None:
    body = form(*fields)
    content: Any = iter([body[start : start + 50_000] for start in range(0, len(body), 50_000)]) if is_chunked else body
    headers = {"authorization": f"Bearer {MODELS}", "content-type": "multipart/form-data; boundary=b"}
    response = proxy.post("/v1/audio/transcriptions", content=content, headers=headers)
    assert response.status_code == status
    assert len(upstream.requests) == (status == 200)
    if status == 200:
        assert bytes(upstream.requests[0].body) == body


def test_a_second_model_behind_megabytes_does_not_reach_the_upstream_whole(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    large = ('name="file"; filename="a.mp3"', b"\0" * (6 << 20))
    body = form(('name="model"', b"gpt-4o-mini"), large, ('name="model"', b"whisper-1"))
    headers = {"authorization": f"Bearer {MODELS}", "content-type": "multipart/form-data; boundary=b"}
    response = proxy.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert error_of(response) == (403, "invalid_request_error", "model_not_allowed")
    assert not any(request.complete for request in upstream.requests)


def test_files_need_no_model_and_large_bodies_must_show_theirs(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    headers = {"authorization": f"Bearer {MODELS}"}
    assert proxy.post("/v1/files", headers=headers, files={"file": b"x" * 100}).status_code == 200
    response = ask(proxy, MODELS, json={"x": "y" * (5 << 20)})
    assert error_of(response) == (413, "invalid_request_error", "request_too_large")
    assert len(upstream.requests) == 1


def test_a_key_passes_from_its_networks_only(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    def status_from(*forwarded: str) -> int:
        headers = [("authorization", f"Bearer {NETWORKS}"), *(("x-forwarded-for", said) for said in forwarded)]
        return proxy.get("/v1/models", headers=headers).status_code

    assert status_from("192.0.2.9") == 200
    assert status_from("6.6.6.6, 192.0.2.9") == 200
    assert status_from("2001:db8::9") == 200
    assert status_from("192.0.2.9, 6.6.6.6") == 403
    assert status_from("192.0.3.9") == 403
    assert status_from() == 403
    assert len(upstream.requests) == 3
    assert all(request.value("x-forwarded-for") is None for request in upstream.requests)


def test_two_authorization_fields_are_none(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    headers = [("authorization", f"Bearer {FREE}"), ("authorization", f"Bearer {NETWORKS}")]
    assert proxy.get("/v1/models", headers=headers).status_code == 400
    assert not upstream.requests


# Money


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


def streamed(proxy: LiveProxy, api_key: str) -> tuple[bytes, bool]:
    """Return the end of a stream, and whether it was cut."""
    received = b""
    url, headers = f"{proxy.url}/v1/chat/completions", {"authorization": f"Bearer {api_key}"}
    with (
        new_client() as client,
        client.stream("POST", url, json=CHAT | {"stream": True}, headers=headers) as response,
    ):
        assert response.status_code == 200
        try:
            for chunk in response.iter_raw():
                received = received[-2000:] + chunk
        except httpx.RemoteProtocolError:
            return received, True
    return received, False


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


# Elsewhere than /v1 over HTTP


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


def test_a_conversation_is_bound_to_networks_and_models(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    body = {"apiKey": NETWORKS, "sessionId": "s", "content": "hello"}
    refused = proxy.post("/pro/chat/completions", json=body)
    assert (refused.status_code, refused.json()["message"]) == (403, "不允许从您的网络地址使用该密钥")
    refused = proxy.post("/pro/chat/completions", json=body | {"apiKey": MODELS, "model": "gpt-4o"})
    assert (refused.status_code, refused.json()["message"]) == (403, "该密钥不允许使用此模型")
    assert not upstream.requests


SOCKET_FEW, SOCKET_MODEL, SOCKET_CENT = "sk-socket-few-000001", "sk-socket-model-0001", "sk-socket-cent-00001"


@pytest.fixture(scope="module", params=["memory", pytest.param("redis", marks=needs_redis)])
def socket_proxy(request: pytest.FixtureRequest, socket_upstream: RealtimeUpstream) -> Iterator[LiveProxy]:
    decided = {
        SOCKET_FEW: {"concurrent_streams": 1},
        SOCKET_MODEL: {"allowed_models": "gpt-realtime"},
        SOCKET_CENT: {"monthly_usd": "0.1000000"},
    }
    url = "" if request.param == "memory" else REDIS_URL
    with limited_proxy(decided, UPSTREAM_URL=socket_upstream.url, REDIS_URL=url, RESERVE_OUTPUT_TOKENS="500") as proxy:
        yield proxy


def dial(proxy: LiveProxy, api_key: str, query: str = "model=gpt-realtime") -> connect:
    url = f"{proxy.url.replace('http', 'ws')}/v1/realtime?{query}"
    headers = {"authorization": f"Bearer {api_key}"}
    return connect(url, additional_headers=headers, proxy=None, compression=None, open_timeout=60)


async def status_of_refusal(proxy: LiveProxy, api_key: str, query: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        await dial(proxy, api_key, query)
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


async def test_a_websocket_is_a_request_in_progress(socket_proxy: LiveProxy, socket_upstream: RealtimeUpstream) -> None:
    socket_upstream.play()
    async with dial(socket_proxy, SOCKET_FEW):
        found = await status_of_refusal(socket_proxy, SOCKET_FEW, "model=gpt-realtime")
        assert found == (429, "rate_limit_exceeded")
    deadline = time.monotonic() + 60
    while True:
        try:
            async with dial(socket_proxy, SOCKET_FEW):
                break
        except InvalidStatus:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "query",
    ["model=gpt-4o", "", "model=gpt-realtime&model=gpt-4o", "x=" + "y" * 5000 + "&model=gpt-realtime"],
    ids=["another", "none", "two", "long"],
)
async def test_a_websocket_is_of_an_allowed_model(
    socket_proxy: LiveProxy, socket_upstream: RealtimeUpstream, query: str
) -> None:
    socket_upstream.play()
    async with dial(socket_proxy, SOCKET_MODEL) as websocket:
        await websocket.send('{"type": "hello"}')
        assert await websocket.recv() == '{"type": "hello"}'
    assert await status_of_refusal(socket_proxy, SOCKET_MODEL, query) == (403, "model_not_allowed")


async def test_a_session_ends_where_its_money_does(socket_proxy: LiveProxy, socket_upstream: RealtimeUpstream) -> None:
    async def responses(websocket: Any) -> None:
        async for _ in websocket:
            number = next(numbers)
            usage = {"input_tokens": 0, "output_tokens": 500, "output_token_details": {"audio_tokens": 500}}
            response = {"id": f"resp_{number}", "usage": usage}
            await websocket.send(json.dumps({"type": "response.done", "response": response}))

    numbers = iter(range(1000))
    socket_upstream.play(responses)
    said: list[dict[str, Any]] = []

    async def talk() -> None:
        async with dial(socket_proxy, SOCKET_CENT) as websocket:
            for _ in range(50):
                with contextlib.suppress(ConnectionClosed):
                    await websocket.send('{"type": "response.create"}')
                said.append(json.loads(await websocket.recv()))

    with pytest.raises(ConnectionClosed) as closed:
        await talk()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert said[-1]["error"]["code"] == "insufficient_quota"
    # 500 tokens of speech cost 0.032: what is spent, and the 0.032 that are reserved, are at most 0.10, and one more.
    assert sum(message["type"] == "response.done" for message in said) == 3
    wait_until(lambda: spent_by(socket_proxy, SOCKET_CENT) > 0)
    assert await status_of_refusal(socket_proxy, SOCKET_CENT, "model=gpt-realtime") == (429, "insufficient_quota")


# Where nobody is to be cut off


PATIENT, SOCKET_PATIENT = "sk-long-patient-0001", "sk-socket-patient-01"


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


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
def uncut_store(request: pytest.FixtureRequest) -> dict[str, str]:
    return {
        "REDIS_URL": "" if request.param == "memory" else REDIS_URL,
        "CUT_AT_SPEND_LIMIT": "false",
        "RESERVE_OUTPUT_TOKENS": "500",
    }


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


async def test_a_session_is_not_ended_where_that_is_not_wanted_and_is_the_last_one(
    uncut_store: dict[str, str], socket_upstream: RealtimeUpstream
) -> None:
    async def responses(websocket: Any) -> None:
        async for message in websocket:
            usage = {"input_tokens": 0, "output_tokens": 500, "output_token_details": {"audio_tokens": 500}}
            response = {"id": json.loads(message)["event_id"], "usage": usage}
            await websocket.send(json.dumps({"type": "response.done", "response": response}))

    socket_upstream.play(responses)
    decided = {SOCKET_PATIENT: {"monthly_usd": "0.1000000"}}
    with limited_proxy(decided, UPSTREAM_URL=socket_upstream.url, **uncut_store) as proxy:
        async with dial(proxy, SOCKET_PATIENT) as websocket:
            for number in range(10):
                await websocket.send(json.dumps({"type": "response.create", "event_id": f"event_{number}"}))
                assert json.loads(await websocket.recv())["type"] == "response.done"
        wait_until(lambda: spent_by(proxy, SOCKET_PATIENT) == Decimal("0.32"))
        refused = await status_of_refusal(proxy, SOCKET_PATIENT, "model=gpt-realtime")
        assert refused == (429, "insufficient_quota")


# Of every key, and of addresses


KNOWN = "sk-known-000000000001"


@pytest.fixture(scope="module")
def _strict_proxy(module_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with limited_proxy(
        {KNOWN: {}},
        UPSTREAM_URL=module_upstream.url,
        REDIS_URL="",
        GATEWAY_MODE="known",
        SANDBOX_ENABLED="true",
        ADDRESS_REQUESTS_PER_MINUTE="3",
        ADDRESS_MONTHLY_USD="0.001",
        KEY_MONTHLY_USD="1000",
    ) as proxy:
        yield proxy


@pytest.fixture
def strict_proxy(_strict_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    return _strict_proxy


def test_only_registered_keys_pass_where_the_operator_wants_that(
    strict_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    headers = {"x-forwarded-for": "198.51.100.1"}
    for headers_of_stranger in ({"authorization": "Bearer sk-stranger-0000001"}, {}):
        refused = strict_proxy.get("/v1/models", headers=headers | headers_of_stranger)
        assert error_of(refused) == (403, "invalid_request_error", "key_not_registered")
    assert not upstream.requests
    client = OpenAI(api_key="sk-stranger-0000001", base_url=f"{strict_proxy.url}/v1")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.list()
    known = {"authorization": f"Bearer {KNOWN}"}
    assert strict_proxy.get("/v1/models", headers=headers | known).status_code == 200
    sandbox = {"authorization": "Bearer sk-sandbox"}
    assert strict_proxy.get("/v1/models", headers=headers | sandbox).status_code == 200


def test_an_address_has_limits_whatever_its_keys(strict_proxy: LiveProxy) -> None:
    def status_from(address: str, api_key: str = KNOWN) -> int:
        headers = {"authorization": f"Bearer {api_key}", "x-forwarded-for": address}
        return strict_proxy.get("/v1/models", headers=headers).status_code

    assert [status_from("198.51.100.7"), status_from("198.51.100.7", "sk-sandbox"), status_from("198.51.100.7")] == [
        200
    ] * 3
    assert status_from("198.51.100.7", "sk-sandbox") == 429
    assert status_from("198.51.100.8") == 200
    assert [status_from(f"2001:db8:7::{number}") for number in range(1, 5)] == [200, 200, 200, 429]


def test_what_an_address_has_spent_is_known_after_a_restart(strict_proxy: LiveProxy) -> None:
    def spend() -> int:
        headers = {"x-forwarded-for": "198.51.100.77"}
        return ask(strict_proxy, KNOWN, json={"max_tokens": 500}, headers=headers).status_code

    assert [spend(), spend()] == [200, 200]  # 0.00063 of 0.001 USD
    kept = strict_proxy.var_dir / "limits.json"
    wait_until(lambda: kept.exists() and '"spent": {"a:' in kept.read_text())
    assert "198.51.100" not in kept.read_text()
    strict_proxy.stop()
    strict_proxy.start()
    assert spend() == 200
    assert spend() == 429


def test_a_key_with_more_than_the_default_or_less(module_upstream: FakeUpstream, upstream: FakeUpstream) -> None:
    decided = {
        "sk-no-limit-0000000001": {"requests_per_minute": 0},
        "sk-more-000000000000001": {"requests_per_minute": 2},
    }
    with limited_proxy(
        decided, UPSTREAM_URL=upstream.url, REDIS_URL="", KEY_REQUESTS_PER_MINUTE="1", ALLOWED_MODELS="gpt-4o-mini"
    ) as proxy:
        assert [ask(proxy, "sk-no-limit-0000000001").status_code for _ in range(5)] == [200] * 5
        assert [ask(proxy, "sk-more-000000000000001").status_code for _ in range(3)] == [200, 200, 429]
        assert [ask(proxy, "sk-anybody-00000000001").status_code for _ in range(2)] == [200, 429]
        assert ask(proxy, "sk-no-limit-0000000001", json={"model": "gpt-4o"}).status_code == 403


# Without Redis, and with one that is away


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
