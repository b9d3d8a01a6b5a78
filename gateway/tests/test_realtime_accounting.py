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

from gateway.tests.fake_realtime import RealtimeUpstream, echo
from gateway.tests.live import LiveProxy

KEY = "sk-session-0000000001"
BLOCK = (
    "from billing.models import ApiKey; from billing.services import block_key;"
    "[block_key(key) for key in ApiKey.objects.all()]"
)
COLUMNS = "usage_source, pricing, model, input_tokens, output_tokens"


@pytest.fixture(scope="module")
def module_upstream() -> Iterator[RealtimeUpstream]:
    with RealtimeUpstream() as server:
        yield server


@pytest.fixture
def upstream(module_upstream: RealtimeUpstream) -> Iterator[RealtimeUpstream]:
    module_upstream.play(echo)
    yield module_upstream
    assert module_upstream.wait_until_idle()
    assert not module_upstream.failures


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
