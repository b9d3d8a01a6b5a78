"""What the ledger holds of WebSocket sessions, through the live proxy: response by response, and whatever cuts them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.live import LiveProxy

KEY = "sk-session-0000000001"
BLOCK = (
    "from billing.models import ApiKey; from billing.services import block_key;"
    "[block_key(key) for key in ApiKey.objects.all()]"
)
COLUMNS = "usage_source, pricing, model, input_tokens, output_tokens"


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture
def proxy(upstream: RealtimeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1") as live:
        yield live


def dial(proxy: LiveProxy, target: str = "/v1/realtime?model=gpt-realtime") -> connect:
    url, headers = proxy.url.replace("http", "ws") + target, {"Authorization": f"Bearer {KEY}"}
    return connect(url, additional_headers=headers, proxy=None, compression=None, open_timeout=60)


async def say(websocket: ServerConnection, kind: str, **members: Any) -> None:
    await websocket.send(json.dumps({"type": kind, "event_id": "event_1"} | members))


async def answer(websocket: ServerConnection) -> None:
    """Answer each message with a response that used 10 and 20 tokens."""
    async for message in websocket:
        response = {"id": f"resp_{message}", "usage": {"input_tokens": 10, "output_tokens": 20}}
        await say(websocket, "response.done", response=response)


async def next_of_kind(websocket: ClientConnection, kind: str) -> dict[str, Any]:
    while True:
        message: dict[str, Any] = json.loads(await websocket.recv())
        if message["type"] == kind:
            return message


# A response that the client saw complete


async def test_a_response_is_in_the_ledger_while_its_session_goes_on(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    upstream.play(answer)
    async with dial(proxy) as client:
        for number in range(3):
            await client.send(str(number))
            await next_of_kind(client, "response.done")
        said = f"SELECT {COLUMNS} FROM billing_usagerecord"
        assert proxy.wait_for_rows(said, 3, timeout_s=30) == [("upstream", "priced", "gpt-realtime", 10, 20)] * 3
        ids = proxy.rows("SELECT DISTINCT event_id FROM billing_usagerecord")
        assert client.response is not None
        assert len(ids) == 3
        assert (client.response.headers["x-proxy-request-id"],) in ids


async def test_a_killed_worker_loses_no_response_that_the_client_saw(upstream: RealtimeUpstream) -> None:
    upstream.play(answer)
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="5") as proxy:
        async with dial(proxy) as client:
            for number in range(3):
                await client.send(str(number))
                await next_of_kind(client, "response.done")
            for pid in proxy.worker_pids:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(ConnectionClosed):
                await client.recv()
        rows = proxy.wait_for_rows("SELECT output_tokens FROM billing_usagerecord", 3)
        assert rows == [(20,)] * 3


# A response that is cut


CREATED = {"id": "resp_1", "model": "gpt-4.1", "usage": None}


async def begin(websocket: ServerConnection, *deltas: tuple[str, str]) -> None:
    await say(websocket, "response.created", response=CREATED)
    for kind, delta in deltas:
        await say(websocket, f"response.{kind}.delta", delta=delta)


async def begin_and_wait(websocket: ServerConnection) -> None:
    """Begin to answer the first `response.create`, and never end."""
    async for message in websocket:
        if json.loads(message)["type"] == "response.create":
            await begin(websocket, *[("output_text", "hello world ")] * 50)
            await say(websocket, "waiting")


async def begin_and_drop(websocket: ServerConnection) -> None:
    await websocket.recv()
    await begin(websocket, *[("output_text", "hello world ")] * 50)
    websocket.transport.abort()


def recorded(proxy: LiveProxy, count: int = 1) -> list[tuple[Any, ...]]:
    return proxy.wait_for_rows(f"SELECT {COLUMNS} FROM billing_usagerecord ORDER BY event_id", count)


async def test_a_response_that_its_client_leaves_is_estimated(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    upstream.play(begin_and_wait)
    create = {"type": "response.create", "model": "gpt-4.1-mini", "input": "tell me a story about a fox " * 10}
    async with dial(proxy, "/v1/responses") as client:
        await client.send(json.dumps(create))
        await next_of_kind(client, "waiting")
    [(source, pricing, model, input_tokens, output_tokens)] = recorded(proxy)
    assert (source, pricing, model) == ("estimated", "priced", "gpt-4.1")
    assert 65 < input_tokens < 90
    assert 100 <= output_tokens < 110
    assert proxy.rows("SELECT outcome FROM billing_usagerecord") == [("client_closed",)]


async def test_a_response_that_the_upstream_cuts_is_estimated(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    upstream.play(begin_and_drop)
    async with dial(proxy, "/v1/responses") as client:
        await client.send(json.dumps({"type": "response.create", "model": "gpt-4.1", "input": "a story"}))
        with contextlib.suppress(ConnectionClosed):
            while True:
                await client.recv()
    [(source, pricing, _, input_tokens, output_tokens)] = recorded(proxy)
    assert (source, pricing) == ("estimated", "priced")
    assert 0 < input_tokens < 15
    assert 100 <= output_tokens < 110
    assert proxy.rows("SELECT outcome FROM billing_usagerecord") == [("upstream_error",)]


async def test_what_was_told_is_not_estimated_again(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        for usage in ({"input_tokens": 10, "output_tokens": 20}, None):
            await websocket.recv()
            await begin(websocket, ("output_text", "hello " * 100), ("output_text", "world"))
            if usage is not None:
                await say(websocket, "response.done", response=CREATED | {"usage": usage})
        await say(websocket, "waiting")
        await websocket.wait_closed()

    upstream.play(script)
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "seven words about the fox"}]}
    async with dial(proxy) as client:
        await client.send(json.dumps({"type": "conversation.item.create", "item": item}))
        await next_of_kind(client, "response.done")
        await client.send(json.dumps({"type": "response.create"}))
        await next_of_kind(client, "waiting")
    told, estimated = recorded(proxy, 2)
    assert told == ("upstream", "priced", "gpt-4.1", 10, 20)
    assert estimated[:2] == ("estimated", "priced")
    assert 5 <= estimated[3] < 30
    assert 100 <= estimated[4] < 110


async def test_an_end_that_does_not_say_its_usage_is_estimated_before_the_client_has_it(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.recv()
        await begin(websocket, ("output_text", "hello " * 10))
        await say(websocket, "response.failed", response=CREATED)
        await websocket.wait_closed()

    upstream.play(script)
    async with dial(proxy, "/v1/responses") as client:
        await client.send(json.dumps({"type": "response.create", "model": "gpt-4.1", "input": "a story"}))
        await next_of_kind(client, "response.failed")
        [row] = recorded(proxy)
    assert row[:3] == ("estimated", "priced", "gpt-4.1")
    assert 10 <= row[4] <= 12


async def test_speech_that_is_cut_is_unpriced_and_not_free(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.recv()
        await begin(websocket, ("output_audio", "UklGRg" * 3000))
        await websocket.wait_closed()

    upstream.play(script)
    async with dial(proxy) as client:
        await client.send(json.dumps({"type": "input_audio_buffer.append", "audio": "UklGRg" * 3000}))
        await next_of_kind(client, "response.output_audio.delta")
    assert recorded(proxy) == [("estimated", "unpriced", "gpt-4.1", 0, 0)]


async def test_sessions_in_which_nothing_was_asked_for_are_free(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def refuse(websocket: ServerConnection) -> None:
        await websocket.recv()
        await say(websocket, "error", error={"code": "invalid_value"})
        await websocket.wait_closed()

    async with dial(proxy):
        pass
    upstream.play(refuse)
    async with dial(proxy) as client:
        await client.send(json.dumps({"type": "response.create", "response": {"instructions": "be brief"}}))
        await next_of_kind(client, "error")
    assert recorded(proxy, 2) == [("none", "free", "gpt-realtime", 0, 0)] * 2


# A key that is blocked


async def test_a_session_ends_when_its_key_is_blocked(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    upstream.play(answer)
    said: list[dict[str, Any]] = []
    async with dial(proxy) as client:
        await client.send("first")
        await next_of_kind(client, "response.done")
        proxy.wait_for_rows("SELECT 1 FROM billing_apikey", 1)
        proxy.manage("shell", "-c", BLOCK)

        async def talk() -> None:
            for number in range(1_000_000):
                await client.send(str(number))
                said.append(json.loads(await client.recv()))

        with pytest.raises(ConnectionClosed) as closed:
            await talk()
        # What was sent while the end came does not keep it from being read.
        with contextlib.suppress(ConnectionClosed):
            said += [json.loads(message) async for message in client]
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert said[-1]["type"] == "error"
    assert (said[-1]["error"]["code"], said[-1]["error"]["type"]) == ("key_blocked", "invalid_request_error")
    assert await upstream.next_close() == (1001, "")
