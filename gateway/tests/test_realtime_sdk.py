"""OpenAI's own Python SDK over WebSocket through the live proxy: to a real server behind it, and to the sandbox."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI, OpenAI
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response
from websockets.typing import Subprotocol

from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.sockets import BODY, KEY, dial, end_of, error_code, errors_in, refusal, secrets_in


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture
def proxy(echoing_proxy: LiveProxy) -> LiveProxy:
    return echoing_proxy


async def play_session(websocket: ServerConnection) -> None:
    """Enough of OpenAI's realtime protocol for one turn."""
    await websocket.send(json.dumps({"type": "session.created", "event_id": "e1", "session": {"type": "realtime"}}))
    async for message in websocket:
        event = json.loads(message)
        if event["type"] == "response.create":
            for delta in ("Hel", "lo"):
                await websocket.send(json.dumps({"type": "response.output_text.delta", "delta": delta}))
            await websocket.send(json.dumps({"type": "response.done", "response": {"status": "completed"}}))
        else:
            await websocket.send(json.dumps({"type": "session.updated", "session": event.get("session")}))


@pytest.fixture
async def sdk(proxy: LiveProxy) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_the_official_sdk_holds_a_conversation(upstream: RealtimeUpstream, sdk: AsyncOpenAI) -> None:
    upstream.play(play_session)
    async with sdk.realtime.connect(model="gpt-realtime") as connection:
        created = await connection.recv()
        await connection.session.update(session={"type": "realtime", "instructions": BODY})
        updated = await connection.recv()
        await connection.response.create()
        text = ""
        async for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.done":
                break
    assert (created.type, updated.type, text) == ("session.created", "session.updated", "Hello")
    assert upstream.requests[0].path == "/v1/realtime?model=gpt-realtime"
    assert upstream.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert await upstream.next_close() == (1000, "")


async def test_the_official_sdk_sees_a_refusal(upstream: RealtimeUpstream, sdk: AsyncOpenAI) -> None:
    body = b'{"error": {"code": "invalid_api_key"}}'
    headers = Headers([("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    upstream.refuse = lambda request: Response(401, "Unauthorized", headers, body)
    with pytest.raises(InvalidStatus) as caught:
        async with sdk.realtime.connect(model="gpt-realtime"):
            pass
    assert (caught.value.response.status_code, caught.value.response.body) == (401, body)


async def test_the_official_sdk_holds_a_responses_socket(upstream: RealtimeUpstream, sdk: AsyncOpenAI) -> None:
    async def script(websocket: ServerConnection) -> None:
        event = json.loads(await websocket.recv())
        await websocket.send(json.dumps({"type": "response.output_text.delta", "delta": event["input"]}))
        await websocket.wait_closed()

    upstream.play(script)
    async with sdk.responses.connect() as connection:
        await connection.send({"type": "response.create", "model": "m", "input": BODY})  # type: ignore[typeddict-unknown-key]
        event = await connection.recv()
    assert (event.type, getattr(event, "delta", None)) == ("response.output_text.delta", BODY)
    assert upstream.requests[0].path == "/v1/responses"


def test_the_synchronous_sdk_holds_a_conversation(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    upstream.play(play_session)
    with OpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as client, client.realtime.connect(model="m") as connection:
        assert connection.recv().type == "session.created"
        connection.response.create()
        assert [connection.recv().type for _ in range(3)][-1] == "response.done"


# The sandbox


async def test_the_sandbox_answers_its_key_and_nothing_goes_upstream(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    client = AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="sk-sandbox")
    async with client, client.realtime.connect(model="gpt-realtime") as connection:
        assert (await connection.recv()).type == "session.created"
        content = [{"type": "input_text", "text": "Guten Tag"}]
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": content}  # type: ignore[typeddict-item]
        )
        await connection.response.create()
        text = ""
        async for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.done":
                break
    assert "Guten Tag" in text
    assert not upstream.requests


async def test_the_sandbox_answers_its_key_in_the_browsers_form(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    offers = [Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.sk-sandbox")]
    async with dial(proxy, subprotocols=offers) as client:
        assert json.loads(await client.recv())["type"] == "session.created"
        assert client.subprotocol == "realtime"
        await client.close(4321, "bye")
    assert not upstream.requests


async def test_the_sandbox_refuses_as_openai_does(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    headers = {"Authorization": "Bearer sk-sandbox"}
    response = await refusal(proxy, "/v1/realtime?model=sandbox-429", additional_headers=headers)
    assert (response.status_code, error_code(response)) == (429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "1"


async def test_a_sandbox_that_drops_is_a_1011(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    headers = {"Authorization": "Bearer sk-sandbox"}
    async with dial(proxy, "/v1/realtime?model=sandbox-cut", additional_headers=headers) as client:
        await client.send(json.dumps({"type": "response.create"}))
        assert (await end_of(client))[0] == 1011


async def test_another_key_goes_upstream(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async with dial(proxy, additional_headers={"Authorization": "Bearer sk-sandbox2"}):
        pass
    assert len(upstream.requests) == 1


# Logs


async def test_no_key_path_or_message_is_logged(proxy: LiveProxy) -> None:
    """The proxy under test logs at DEBUG; uvicorn and websockets would write all of this."""
    assert "DEBUG" in proxy.log
    assert not secrets_in(proxy.log)


async def test_nothing_ordinary_is_logged_as_an_error(proxy: LiveProxy) -> None:
    """Runs last, over everything that this module has made the proxy do."""
    assert not errors_in(proxy.log)
