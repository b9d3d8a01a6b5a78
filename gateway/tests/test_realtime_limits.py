"""Limits of models and money within open WebSocket sessions, through the live proxy, in memory and in a real Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.tests.calls import PATIENCE_S
from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.limited import limited_proxy, spent_by
from gateway.tests.live import LiveProxy
from gateway.tests.redis_server import REDIS_URL, needs_redis

MODELS, REALTIME = "sk-ws-models-00000001", "sk-ws-realtime-000001"
CENT, SHARED, ERRORS, LONG = (
    "sk-ws-cent-000000001",
    "sk-ws-shared-0000001",
    "sk-ws-errors-0000001",
    "sk-ws-long-000000001",
)
SPEECH, IDLE = "sk-ws-speech-0000001", "sk-ws-idle-000000001"
FREE = "sk-ws-without-limits"
DECIDED: dict[str, dict[str, Any]] = {
    MODELS: {"allowed_models": "gpt-4o-mini\no3*"},
    REALTIME: {"allowed_models": "gpt-realtime"},
    CENT: {"monthly_usd": "0.0100000"},
    SHARED: {"monthly_usd": "0.0100000"},
    ERRORS: {"monthly_usd": "0.0100000"},
    LONG: {"monthly_usd": "0.0100000"},
    SPEECH: {"monthly_usd": "0.0600000"},
    IDLE: {"monthly_usd": "0.0600000"},
}
# gpt-4o-mini costs 0.15 and 0.60 USD per million tokens: 15,000 written ones 0.009.
ASK = {"type": "response.create", "model": "gpt-4o-mini", "input": "hello", "max_output_tokens": 15_000}


@pytest.fixture(scope="module", params=["memory", pytest.param("redis", marks=needs_redis)])
def proxy(request: pytest.FixtureRequest, socket_upstream: RealtimeUpstream) -> Iterator[LiveProxy]:
    url = "" if request.param == "memory" else REDIS_URL
    environment = {"UPSTREAM_URL": socket_upstream.url, "REDIS_URL": url, "RESERVE_OUTPUT_TOKENS": "500"}
    with limited_proxy(DECIDED, **environment) as live:
        yield live


class Upstream:
    """Answers each `response.create` with what it cost, or as a test scripts it; `heard` is what came up."""

    def __init__(self, server: RealtimeUpstream) -> None:
        self.server = server
        self.heard: list[Any] = []
        self.output_tokens = 10_000
        server.play(self.answer)

    async def answer(self, websocket: ServerConnection) -> None:
        async for message in websocket:
            event = json.loads(message)
            self.heard.append(event)
            if event.get("input") == "fail":
                await websocket.send(json.dumps({"type": "error", "status": 400, "error": {"code": "x"}}))
            elif event.get("input") == "wait":
                await websocket.send(json.dumps({"type": "response.created", "response": {"id": "r"}}))
            elif event["type"] == "response.create":
                await self.respond(websocket, event)
            else:
                await websocket.send(json.dumps({"type": "heard"}))

    async def respond(self, websocket: ServerConnection, event: dict[str, Any]) -> None:
        usage = {"input_tokens": 0, "output_tokens": self.output_tokens}
        response = {"id": f"resp_{len(self.heard)}", "model": event.get("model"), "usage": usage}
        await websocket.send(json.dumps({"type": "response.created", "response": response | {"usage": None}}))
        await websocket.send(json.dumps({"type": "response.completed", "response": response}))


@pytest.fixture
def upstream(socket_upstream: RealtimeUpstream) -> Iterator[Upstream]:
    yield Upstream(socket_upstream)
    assert socket_upstream.wait_until_idle()
    assert not socket_upstream.failures


def dial(proxy: LiveProxy, api_key: str, target: str = "/v1/responses") -> connect:
    url, headers = proxy.url.replace("http", "ws") + target, {"authorization": f"Bearer {api_key}"}
    return connect(url, additional_headers=headers, proxy=None, compression=None, open_timeout=60)


async def ask(client: ClientConnection, message: object) -> dict[str, Any]:
    """Return the first answer to a message, but for news of one that has begun."""
    await client.send(message if isinstance(message, str | bytes) else json.dumps(message))
    while (answer := json.loads(await client.recv()))["type"] == "response.created":
        pass
    assert isinstance(answer, dict)
    return answer


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Models


async def test_each_response_is_of_an_allowed_model(proxy: LiveProxy, upstream: Upstream) -> None:
    async with dial(proxy, MODELS) as client:
        assert (await ask(client, ASK))["type"] == "response.completed"
        refused = await ask(client, ASK | {"model": "gpt-4o", "event_id": "event_7"})
        assert (refused["type"], refused["status"]) == ("error", 403)
        assert refused["error"] == {
            "message": "This API key may not use the model `gpt-4o`.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_allowed",
            "event_id": "event_7",
        }
        assert (await ask(client, ASK | {"model": "o3-pro"}))["type"] == "response.completed"
    assert [event["model"] for event in upstream.heard] == ["gpt-4o-mini", "o3-pro"]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ('{"type": "response.create"}', "model_not_allowed"),
        ('{"type": "response.create", "prompt": {"id": "pmpt_1"}}', "model_not_allowed"),
        ('{"type": "response.create", "model": "gpt-4o-mini", "response": {"model": "gpt-4o"}}', "model_not_allowed"),
        ('{"type": "response.create", "model": "gpt-4o-mini", "model": "gpt-4o"}', "bad_request"),
        (r'{"type": "response.create", "model": "gpt-4o-mini", "mod\u0065l": "gpt-4o"}', "bad_request"),
        ('{"type": "x", "type": "response.create", "model": "gpt-4o-mini"}', "bad_request"),
        ('{"model": "gpt-4o"}', "bad_request"),
        ('[{"type": "response.create", "model": "gpt-4o"}]', "bad_request"),
        ("model=gpt-4o", "bad_request"),
        (b'\xff{"type": "response.create", "model": "gpt-4o"}', "bad_request"),
        (b'{"type": "response.create", "model": "gpt-4o"}', "model_not_allowed"),
    ],
    ids=lambda value: repr(value)[:60],
)
async def test_nothing_slips_past(proxy: LiveProxy, upstream: Upstream, message: str | bytes, code: str) -> None:
    async with dial(proxy, MODELS) as client:
        assert (await ask(client, message))["error"]["code"] == code
        assert (await ask(client, ASK))["type"] == "response.completed"
    assert len(upstream.heard) == 1


async def test_a_model_in_the_address_must_be_allowed_too(proxy: LiveProxy, upstream: Upstream) -> None:
    async with dial(proxy, MODELS, "/v1/responses?model=gpt-4o-mini") as client:
        assert (await ask(client, ASK | {"model": "gpt-4o"}))["error"]["code"] == "model_not_allowed"
    for query in ("?model=gpt-4o", "?model=gpt-4o-mini&model=gpt-4o", "?" + "x" * 5000):
        with pytest.raises(InvalidStatus) as caught:
            await dial(proxy, MODELS, f"/v1/responses{query}")
        assert caught.value.response.status_code == 403
    assert not upstream.heard


@pytest.mark.parametrize(
    "message",
    [
        {"type": "session.update", "session": {"type": "realtime", "model": "gpt-4o-realtime-preview"}},
        {"type": "response.create", "response": {"model": "gpt-4o-realtime-preview"}},
        {"type": "response.create", "model": "gpt-4o-realtime-preview"},
    ],
    ids=lambda message: json.dumps(message)[:60],
)
async def test_a_realtime_session_does_not_change_to_another_model(
    proxy: LiveProxy, upstream: Upstream, message: dict[str, Any]
) -> None:
    async with dial(proxy, REALTIME, "/v1/realtime?model=gpt-realtime") as client:
        assert (await ask(client, message))["error"]["code"] == "model_not_allowed"
        same = {"type": "session.update", "session": {"type": "realtime", "model": "gpt-realtime"}}
        assert await ask(client, same) == {"type": "heard"}
    assert upstream.heard == [same]


async def test_without_limits_messages_pass_as_they_are(proxy: LiveProxy, upstream: Upstream) -> None:
    async with dial(proxy, FREE) as client:
        await client.send('{"type": "x", "type": "y", "model": 7}')
        assert json.loads(await client.recv()) == {"type": "heard"}


# Money


async def test_money_is_reserved_for_each_response(proxy: LiveProxy, upstream: Upstream) -> None:
    """Of a cent a response of at most 0.009 and a bit is allowed, which uses 0.006; then one of 0.004 is the most."""
    async with dial(proxy, CENT) as client:
        too_much = await ask(client, ASK | {"max_output_tokens": 20_000})
        assert (too_much["status"], too_much["error"]["code"]) == (429, "insufficient_quota")
        assert (await ask(client, ASK))["type"] == "response.completed"
        assert (await ask(client, ASK))["error"]["code"] == "insufficient_quota"
        unpriced = await ask(client, ASK | {"model": "nobody-knows-this-model"})
        assert (unpriced["status"], unpriced["error"]["code"]) == (403, "model_unpriced")
        upstream.output_tokens = 5_000
        assert (await ask(client, ASK | {"max_output_tokens": 6_000}))["type"] == "response.completed"
        assert (await ask(client, ASK | {"max_output_tokens": 2_000}))["error"]["code"] == "insufficient_quota"
    assert len(upstream.heard) == 2
    wait_until(lambda: spent_by(proxy, CENT) == Decimal("0.009"))


async def test_what_one_session_has_reserved_another_has_not(proxy: LiveProxy, upstream: Upstream) -> None:
    async with dial(proxy, SHARED) as other:
        async with dial(proxy, SHARED) as client:
            await client.send(json.dumps(ASK | {"input": "wait"}))
            assert json.loads(await client.recv())["type"] == "response.created"
            assert (await ask(other, ASK))["error"]["code"] == "insufficient_quota"
        upstream.output_tokens = 0
        # The first one's response was never answered: what it is estimated at is little.
        while (await ask(other, ASK | {"max_output_tokens": 14_000}))["type"] == "error":
            pass


async def test_a_request_that_the_upstream_refuses_reserves_nothing(proxy: LiveProxy, upstream: Upstream) -> None:
    async with dial(proxy, ERRORS) as client:
        for _ in range(3):
            assert (await ask(client, ASK | {"input": "fail"}))["error"] == {"code": "x"}
        upstream.output_tokens = 0
        assert (await ask(client, ASK))["type"] == "response.completed"
    assert len(upstream.heard) == 4


async def test_a_response_that_writes_more_than_its_money_is_cut(proxy: LiveProxy, upstream: Upstream) -> None:
    async def ramble(websocket: ServerConnection, event: dict[str, Any]) -> None:
        await websocket.send(json.dumps({"type": "response.created", "response": {"id": "r"}}))
        for number in range(40_000):
            delta = {"type": "response.output_text.delta", "delta": f" word {number}"}
            await websocket.send(json.dumps(delta))

    upstream.respond = ramble  # type: ignore[method-assign]
    said: list[dict[str, Any]] = []

    async def listen() -> None:
        async with dial(proxy, LONG) as client:
            await client.send(json.dumps(ASK | {"max_output_tokens": 100}))
            while True:
                said.append(json.loads(await client.recv()))

    with pytest.raises(ConnectionClosed) as closed:
        await listen()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert said[-1]["error"]["code"] == "insufficient_quota"
    # A cent is 16,666 tokens; of a piece there are three or four.
    pieces = sum(message["type"].endswith(".delta") for message in said)
    assert 16_666 / 5 < pieces < 16_666 / 2


async def status_of(proxy: LiveProxy, api_key: str) -> int:
    try:
        async with dial(proxy, api_key, "/v1/realtime?model=gpt-realtime"):
            return 101
    except InvalidStatus as refusal:
        return refusal.response.status_code


async def test_speech_that_is_cut_costs_what_was_reserved(proxy: LiveProxy, upstream: Upstream) -> None:
    """500 tokens of speech cost 0.032 USD: there is money for a second session only if the first one cost nothing."""

    async def speak(websocket: ServerConnection) -> None:
        async for message in websocket:
            if json.loads(message)["type"] == "response.create":
                delta = {"type": "response.output_audio.delta", "delta": "UklGRg" * 100}
                await websocket.send(json.dumps(delta))

    upstream.server.play(speak)
    async with dial(proxy, IDLE, "/v1/realtime?model=gpt-realtime") as client:
        await client.send(json.dumps({"type": "input_audio_buffer.append", "audio": "UklGRg" * 100}))
    async with dial(proxy, SPEECH, "/v1/realtime?model=gpt-realtime") as client:
        await client.send(json.dumps({"type": "response.create"}))
        await client.recv()
    ended = "SELECT 1 FROM billing_usagerecord WHERE endpoint = '/v1/realtime' AND status = 101 AND usage_source = '{}'"
    proxy.wait_for_rows(ended.format("estimated"), 1)
    proxy.wait_for_rows(ended.format("none"), 1)
    assert await status_of(proxy, SPEECH) == 429
    assert await status_of(proxy, IDLE) == 101
