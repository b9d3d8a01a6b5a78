"""WebSocket sessions that limits refuse or end, through the live proxy, counted in memory and in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.limited import limited_proxy, spent_by
from gateway.tests.live import LiveProxy, wait_until
from gateway.tests.redis_server import REDIS_URL, needs_redis

SOCKET_FEW, SOCKET_MODEL, SOCKET_CENT = "sk-socket-few-000001", "sk-socket-model-0001", "sk-socket-cent-00001"
SOCKET_PATIENT = "sk-socket-patient-01"
SOCKET_TOKENS, SOCKET_MANY, SOCKET_FIRST = "sk-socket-tokens-0001", "sk-socket-many-000001", "sk-socket-first-00001"


@pytest.fixture(scope="module", params=["memory", pytest.param("redis", marks=needs_redis)])
def socket_proxy(request: pytest.FixtureRequest, socket_upstream: RealtimeUpstream) -> Iterator[LiveProxy]:
    decided = {
        SOCKET_FEW: {"concurrent_streams": 1},
        SOCKET_MODEL: {"allowed_models": "gpt-realtime"},
        SOCKET_CENT: {"monthly_usd": "0.1000000"},
        SOCKET_TOKENS: {"tokens_per_minute": 1200},
        SOCKET_FIRST: {"tokens_per_minute": 1200},
        SOCKET_MANY: {"tokens_per_minute": 1_000_000},
    }
    url = "" if request.param == "memory" else REDIS_URL
    with limited_proxy(decided, UPSTREAM_URL=socket_upstream.url, REDIS_URL=url, RESERVE_OUTPUT_TOKENS="500") as proxy:
        yield proxy


def dial(proxy: LiveProxy, api_key: str, query: str = "model=gpt-realtime", *, route: str = "realtime") -> connect:
    url = f"{proxy.url.replace('http', 'ws')}/v1/{route}?{query}"
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


async def respond(websocket: Any) -> None:
    async for number, _ in _numbered(websocket):
        response = {"id": f"resp_{number}", "usage": {"input_tokens": 300, "output_tokens": 200}}
        await websocket.send(json.dumps({"type": "response.done", "response": response}))


async def _numbered(messages: Any) -> Any:
    number = 0
    async for message in messages:
        yield number, message
        number += 1


async def talk_to_the_end(websocket: Any) -> list[dict[str, Any]]:
    """Return what came until the session was ended, which must have been by this gateway."""
    said: list[dict[str, Any]] = []
    with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 - which of the two sees it first is chance
        for _ in range(50):
            with contextlib.suppress(ConnectionClosed):
                await websocket.send('{"type": "response.create", "model": "gpt-4o-mini"}')
            said.append(json.loads(await websocket.recv()))
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert closed.value.rcvd.reason == said[-1]["error"]["message"]
    return said


@pytest.mark.parametrize("route", ["realtime", "responses"])
async def test_a_session_ends_where_its_tokens_of_the_minute_do(
    socket_proxy: LiveProxy, socket_upstream: RealtimeUpstream, route: str
) -> None:
    socket_upstream.play(respond)
    api_key = SOCKET_TOKENS if route == "realtime" else SOCKET_FIRST
    async with dial(socket_proxy, api_key, route=route) as websocket:
        said = await talk_to_the_end(websocket)
    # The third is beyond the 1200 that a minute has; the first three may take no more than a second or two.
    assert [message["type"] for message in said] == ["response.done"] * 3 + ["error"]
    error = said[-1]["error"]
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
    assert "on tokens per min (TPM): limit 1200. Please try again in " in error["message"]
    assert await status_of_refusal(socket_proxy, api_key, "model=gpt-realtime") == (429, "rate_limit_exceeded")


async def test_a_session_within_its_tokens_goes_on(socket_proxy: LiveProxy, socket_upstream: RealtimeUpstream) -> None:
    socket_upstream.play(respond)
    async with dial(socket_proxy, SOCKET_MANY) as websocket:
        for _ in range(50):
            await websocket.send('{"type": "response.create"}')
            assert json.loads(await websocket.recv())["type"] == "response.done"


# Where nobody is to be cut off


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
