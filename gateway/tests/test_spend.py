"""Limits of money through the live proxy: what is reserved is enough, and what costs is never free."""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx2 as httpx
import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.limited import limited_proxy, spent_by
from gateway.tests.live import LiveProxy, new_client, wait_until
from gateway.tests.redis_server import REDIS_URL, needs_redis

CHAT_KEY, RESPONSES_KEY, PARALLEL = "sk-chat-000000000001", "sk-responses-0000001", "sk-parallel-00000001"
TOKENS = 100
FULL = " word" * TOKENS


async def chat(exchange: Exchange) -> None:
    """Stream as many words as the client allows itself, one an event, with all that OpenAI sends beside them."""
    request = json.loads(await exchange.read_body())
    await exchange.start_stream()
    said: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    said += [{"content": " word"}] * request["max_tokens"]
    for delta in said:
        await exchange.events({"choices": [{"index": 0, "delta": delta}]}, done=False)
    await exchange.events({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}, done=False)
    usage = {"prompt_tokens": 10, "completion_tokens": request["max_tokens"], "total_tokens": 10}
    await exchange.events({"model": "gpt-4o-mini", "choices": [], "usage": usage})
    await exchange.end_stream()


async def respond(exchange: Exchange) -> None:
    """The same of /v1/responses, which says all of the text again four times at its end."""
    await exchange.read_body()
    await exchange.start_stream()

    async def send(kind: str, **fields: Any) -> None:
        data = json.dumps({"type": kind, **fields})
        await exchange.chunk(f"event: {kind}\ndata: {data}\n\n".encode())

    await send("response.created", response={"id": "r", "status": "in_progress"})
    for _ in range(TOKENS):
        await send("response.output_text.delta", delta=" word")
    part = {"type": "output_text", "text": FULL}
    await send("response.output_text.done", text=FULL)
    await send("response.content_part.done", part=part)
    await send("response.output_item.done", item={"content": [part]})
    usage = {"input_tokens": 10, "output_tokens": TOKENS, "total_tokens": 10 + TOKENS}
    output = [{"content": [part]}]
    response = {"id": "r", "model": "gpt-4o-mini", "status": "completed", "output": output, "usage": usage}
    await send("response.completed", response=response)
    await exchange.end_stream()


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


DRY = "sk-dry-0000000000001"
DRAWS = "sk-draws-00000000001"
THINKS = "sk-thinks-0000000001"
PACKED = "sk-packed-0000000001"
IGNORED = "sk-ignored-000000001"
DECIDED: dict[str, dict[str, Any]] = {
    PACKED: {"monthly_usd": "0.0100000"},
    IGNORED: {"monthly_usd": "0.0000790"},
    THINKS: {"monthly_usd": "0.0400000"},
    DRAWS: {"monthly_usd": "15"},
    DRY: {"monthly_usd": "0.0000001"},
    CHAT_KEY: {"monthly_usd": "0.0000790"},
    RESPONSES_KEY: {"monthly_usd": "0.0001000"},
    PARALLEL: {"monthly_usd": "0.0100000"},
}


@pytest.fixture(scope="module", params=["memory", pytest.param("redis", marks=needs_redis)])
def proxy(request: pytest.FixtureRequest, upstream: FakeUpstream) -> Iterator[LiveProxy]:
    shared = {"REDIS_URL": ""} if request.param == "memory" else {"REDIS_URL": REDIS_URL, "WORKERS": "2"}
    with limited_proxy(DECIDED, UPSTREAM_URL=upstream.url, **shared) as server:
        yield server


def bearer(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"}


def streamed(proxy: LiveProxy, path: str, api_key: str, body: dict[str, Any]) -> bytes:
    """Return a stream, which must not be cut."""
    headers = bearer(api_key)
    with new_client() as client, client.stream("POST", proxy.url + path, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        return b"".join(response.iter_raw())


def test_a_chat_that_stays_inside_its_own_bound_is_not_cut(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = chat
    message = {"role": "user", "content": "hello"}
    body = {"model": "gpt-4o-mini", "stream": True, "max_tokens": TOKENS, "messages": [message]}
    received = streamed(proxy, "/v1/chat/completions", CHAT_KEY, body)
    assert received.count(b" word") == TOKENS
    assert received.endswith(b"data: [DONE]\n\n")
    assert b"insufficient_quota" not in received


def test_an_upstream_that_does_not_keep_to_the_bound_is_cut(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        for _ in range(100 * TOKENS):
            await exchange.events({"choices": [{"index": 0, "delta": {"content": " word"}}]}, done=False)

    upstream.script = script
    body = {"model": "gpt-4o-mini", "stream": True, "max_tokens": TOKENS, "messages": []}
    received = b""
    url = f"{proxy.url}/v1/chat/completions"
    with contextlib.suppress(httpx.RemoteProtocolError), new_client() as client:  # noqa: SIM117
        with client.stream("POST", url, json=body, headers=bearer(IGNORED)) as response:
            for chunk in response.iter_raw():
                received += chunk
    assert b'"insufficient_quota"' in received
    assert received.count(b" word") < 4 * TOKENS


def test_a_response_that_says_its_text_five_times_is_not_cut(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = respond
    body = {"model": "gpt-4o-mini", "stream": True, "max_output_tokens": TOKENS, "input": "hello"}
    received = streamed(proxy, "/v1/responses", RESPONSES_KEY, body)
    assert b"event: response.completed" in received
    assert b"insufficient_quota" not in received


def test_of_two_hundred_streams_at_once_none_that_is_admitted_is_cut(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = chat

    async def run() -> list[int]:
        limits = httpx.Limits(max_connections=200)
        body = {"model": "gpt-4o-mini", "stream": True, "max_tokens": 500, "messages": []}
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=60, limits=limits) as client:

            async def one() -> int:
                response = await client.post(f"{proxy.url}/v1/chat/completions", json=body, headers=bearer(PARALLEL))
                assert (response.status_code == 429) or response.content.endswith(b"data: [DONE]\n\n")
                return response.status_code

            return await asyncio.gather(*(one() for _ in range(200)))

    passed = asyncio.run(run()).count(200)
    assert passed > 0
    # 500 tokens that are written, and ten that are read.
    wait_until(lambda: spent_by(proxy, PARALLEL) == passed * Decimal("0.0003015"))
    assert spent_by(proxy, PARALLEL) <= Decimal("0.01")


# What costs money though its answer does not tell how much


async def accept(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer(b'{"id": "x"}')


COSTLY = [
    ("/v1/batches", {"input_file_id": "f"}),
    ("/v1/videos", {"model": "sora-2", "prompt": "x", "seconds": "12"}),
    ("/v1/videos/video_1/remix", {"prompt": "x"}),
    ("/v1//videos/./edits", {"prompt": "x"}),
    ("/v1/videos/extensions", {"prompt": "x"}),
    ("/v1/fine_tuning/jobs", {"model": "gpt-4o-mini-2024-07-18", "training_file": "f"}),
    ("/v1/evals/eval_1/runs", {"data_source": {"model": "gpt-4o", "type": "completions"}}),
    ("/v1/realtime/client_secrets", {"session": {"model": "gpt-realtime"}}),
    ("/v1/realtime/sessions", {"model": "gpt-realtime"}),
    ("/v1/realtime/calls/rtc_1/accept", {"type": "realtime"}),
    ("/v1/containers", {"name": "x"}),
    ("/v1/vector_stores/vs_1/search", {"query": "x"}),
]
FREE = [
    ("/v1/batches/batch_1/cancel", {}),
    ("/v1/fine_tuning/jobs/ft_1/cancel", {}),
    ("/v1/conversations", {}),
    ("/v1/moderations", {"input": "x"}),
    ("/v1/realtime/calls/rtc_1/hangup", {}),
]


def test_whoever_has_nothing_left_begins_nothing_that_costs(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = accept
    headers = bearer(DRY)
    # The key's only unit goes to the first, whatever that costs.
    assert proxy.post("/v1/batches", json={"input_file_id": "f"}, headers=headers).status_code == 200
    refused = {path: proxy.post(path, json=body, headers=headers).status_code for path, body in COSTLY}
    assert set(refused.values()) == {429}, refused
    form = {"model": (None, "sora-2"), "prompt": (None, "x"), "input_reference": ("a.png", b"1")}
    assert proxy.post("/v1/videos", files=form, headers=headers).status_code == 429
    sdp = headers | {"content-type": "application/sdp"}
    assert proxy.post("/v1/realtime/calls", content=b"v=0", headers=sdp).status_code == 429
    passed = {path: proxy.post(path, json=body, headers=headers).status_code for path, body in FREE}
    assert set(passed.values()) == {200}, passed
    assert proxy.get("/v1/videos", headers=headers).status_code == 200


def test_an_image_is_edited_whatever_its_file_weighs(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = accept
    picture = b"x" * 1_600_000
    form = {"model": (None, "gpt-image-1"), "prompt": (None, "x"), "image": ("a.png", picture)}
    response = proxy.post("/v1/images/edits", files=form, headers=bearer(DRAWS))
    assert response.status_code == 200, response.text
    body = {"model": "gpt-image-1", "prompt": "x"}
    images = [{"image_url": "data:image/png;base64," + "A" * 1_600_000}]
    assert proxy.post("/v1/images/edits", json=body | {"images": images}, headers=bearer(DRAWS)).status_code == 200


async def think(exchange: Exchange) -> None:
    """Say a word after 60,000 tokens of thought that nobody sees, as far as the request allows them."""
    request = json.loads(await exchange.read_body())
    thought = min(request.get("max_completion_tokens", 60_000), 60_000)
    await exchange.start_stream()
    await exchange.events({"choices": [{"index": 0, "delta": {"content": "hi"}}]}, done=False)
    usage = {"prompt_tokens": 10, "completion_tokens": thought, "total_tokens": thought}
    await exchange.events({"model": "gpt-5-mini", "choices": [], "usage": usage})
    await exchange.end_stream()


def test_thoughts_that_no_stream_shows_do_not_overshoot(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = think
    body = {"model": "gpt-5-mini", "stream": True, "messages": []}  # 2 USD per million tokens
    refused = proxy.post("/v1/chat/completions", json=body, headers=bearer(THINKS))
    assert refused.status_code == 429
    received = streamed(proxy, "/v1/chat/completions", THINKS, body | {"max_completion_tokens": 19_000})
    assert received.endswith(b"data: [DONE]\n\n")
    wait_until(lambda: spent_by(proxy, THINKS) > Decimal("0.038"))
    assert spent_by(proxy, THINKS) <= Decimal("0.04")


async def ramble_compressed(exchange: Exchange) -> None:
    """Stream two hundred thousand words, compressed."""
    await exchange.read_body()
    await exchange.start_stream(headers=(("content-type", "text/event-stream"), ("content-encoding", "gzip")))
    packer = zlib.compressobj(wbits=31)
    events = b'data: {"choices": [{"index": 0, "delta": {"content": " word"}}]}\n\n' * 100
    for _ in range(2000):
        await exchange.chunk(packer.compress(events) + packer.flush(zlib.Z_SYNC_FLUSH))
    await exchange.chunk(packer.flush())
    await exchange.end_stream()


def test_a_compressed_stream_is_cut_where_its_money_ends(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = ramble_compressed
    body = {"model": "gpt-4o-mini", "stream": True, "stream_options": {"include_usage": True}, "messages": []}
    received = b""
    with new_client() as client, contextlib.suppress(httpx.RemoteProtocolError):
        url = f"{proxy.url}/v1/chat/completions"
        with client.stream("POST", url, json=body, headers=bearer(PACKED)) as response:
            for chunk in response.iter_bytes():
                received = received[-2000:] + chunk
    assert b'"insufficient_quota"' in received
    wait_until(lambda: spent_by(proxy, PACKED) > Decimal("0.001"))
    assert spent_by(proxy, PACKED) <= Decimal("0.01")
