"""The practice upstream over WebSocket: realtime and responses, by the SDK's strict models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.realtime import RealtimeServerEvent
from openai.types.responses import ResponsesServerEvent
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus

from gateway.sandbox import Pace, Sandbox, SandboxRealtime, SandboxTransport, connect_realtime
from gateway.tests.calls import until
from gateway.tests.sandbox_clients import NO_PAUSE, PATIENCE_S, WEATHER, collect, new_sdk, strictly


async def told(connection: SandboxRealtime, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Send the messages, and return what comes up to the answer to an unknown one."""
    for message in messages:
        await connection.send(json.dumps(message))
    await connection.send('{"type": "end"}')
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(PATIENCE_S):
        while not events or events[-1].get("error", {}).get("param") != "type":
            events.append(json.loads(await connection.recv()))
    return events[:-1]


def user_item(text: str) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": content}}


async def new_realtime(model: str = "gpt-realtime", pace: Pace = NO_PAUSE) -> SandboxRealtime:
    return await connect_realtime(f"/v1/realtime?model={model}".encode(), ["realtime"], pace=pace)


async def test_realtime_echoes_text_in_the_api_s_order() -> None:
    connection = await new_realtime()
    assert connection.subprotocol == "realtime"
    assert connection.response.headers["sec-websocket-protocol"] == "realtime"
    events = await told(
        connection,
        {"type": "session.update", "session": {"type": "realtime", "instructions": "Be kind."}},
        user_item("Hello 你好 👋"),
        {"type": "response.create"},
    )
    for event in events:
        strictly(RealtimeServerEvent, event)
    kinds = [event["type"] for event in events]
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "session.created",
        "session.updated",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "conversation.item.done",
        "response.output_item.done",
        "response.done",
        "rate_limits.updated",
    ]
    assert len({event["event_id"] for event in events}) == len(events)
    assert events[1]["session"]["instructions"] == "Be kind."
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    done = events[-2]["response"]
    assert "Hello 你好 👋" in text == done["output"][0]["content"][0]["text"]
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]


async def test_realtime_is_deterministic() -> None:
    talk = (user_item("Hello"), {"type": "response.create"})
    assert await told(await new_realtime(), *talk) == await told(await new_realtime(), *talk)


async def test_realtime_calls_functions_and_takes_their_results() -> None:
    connection = await new_realtime()
    tools = [{"type": "function", **WEATHER}]
    create = {"type": "response.create", "response": {"tools": tools}}
    events = await told(connection, user_item("How is it?"), create)
    for event in events:
        strictly(RealtimeServerEvent, event)
    call = events[-2]["response"]["output"][0]
    assert (call["type"], json.loads(call["arguments"])["days"]) == ("function_call", 3)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "18 °C"}
    events = await told(connection, {"type": "conversation.item.create", "item": result}, create)
    assert "The tool answered: 18 °C" in events[-2]["response"]["output"][0]["content"][0]["text"]


async def test_realtime_counts_audio_and_keeps_items() -> None:
    connection = await new_realtime()
    audio = base64.b64encode(b"x" * 300).decode()
    item = user_item("Hi")["item"] | {"id": "item_mine"}
    events = await told(
        connection,
        {"type": "input_audio_buffer.append", "audio": audio},
        {"type": "input_audio_buffer.commit"},
        {"type": "response.create", "response": {"max_output_tokens": 2, "conversation": "none"}},
        {"type": "input_audio_buffer.append", "audio": audio},
        {"type": "input_audio_buffer.clear"},
        {"type": "conversation.item.create", "item": item},
        {"type": "conversation.item.retrieve", "item_id": "item_mine"},
        {"type": "conversation.item.truncate", "item_id": "item_mine", "content_index": 0, "audio_end_ms": 5},
        {"type": "conversation.item.delete", "item_id": "item_mine"},
        {"type": "response.create", "response": {"input": [user_item("Only this")["item"]]}},
    )
    for event in events:
        strictly(RealtimeServerEvent, event)
    by_kind = {event["type"]: event for event in events}
    assert by_kind["input_audio_buffer.committed"]
    assert by_kind["input_audio_buffer.cleared"]
    assert by_kind["conversation.item.retrieved"]["item"]["content"] == item["content"]
    assert by_kind["conversation.item.deleted"]["item_id"] == "item_mine"
    first, second = (event["response"] for event in events if event["type"] == "response.done")
    assert first["status_details"]["reason"] == "max_output_tokens"
    assert first["conversation_id"] is None
    assert "Only this" in second["output"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("{", None),
        ("[]", None),
        ('{"type": "session.explode"}', "type"),
        ('{"type": "session.update"}', "session"),
        ('{"type": "conversation.item.create", "item": {"type": "message"}}', "item.role"),
        ('{"type": "conversation.item.create", "item": {"type": "cat"}}', "item.type"),
        ('{"type": "conversation.item.delete", "item_id": "absent"}', "item_id"),
        ('{"type": "input_audio_buffer.commit"}', None),
        ('{"type": "response.cancel"}', None),
    ],
)
async def test_a_wrong_realtime_event_gets_an_error_and_the_talk_goes_on(message: str, param: str | None) -> None:
    connection = await new_realtime()
    await connection.recv()
    await connection.send(message)
    event = json.loads(await connection.recv())
    strictly(RealtimeServerEvent, event)
    assert (event["type"], event["error"]["param"]) == ("error", param)
    assert (await told(connection, user_item("Hi")))[0]["type"] == "conversation.item.added"


async def test_json_of_any_depth_gets_an_event_and_an_answer() -> None:
    # Somewhere below 1000, depending on the stack, JSON can still be read but no longer be written.
    for depth in range(700, 1000):
        nested = '{"a":' * depth + "1" + "}" * depth
        connection = await new_realtime()
        await connection.recv()
        await connection.send(f'{{"type": "session.update", "session": {nested}}}')
        event = json.loads(await connection.recv())
        assert event["type"] in ("session.updated", "error")
        body = f'{{"model": "m", "input": "x", "metadata": {nested}}}'.encode()
        assert Sandbox().answer("POST", b"/v1/responses", b"application/json", body).status in (200, 400)


async def test_a_realtime_item_over_1_mib_is_an_error() -> None:
    connection = await new_realtime()
    events = await told(connection, user_item("x" * 2**20))
    assert [event["type"] for event in events] == ["session.created", "error"]


async def test_closing_and_dropping_raise_what_websockets_raises() -> None:
    closed = await new_realtime()
    await closed.close(1000, "bye")
    with pytest.raises(ConnectionClosedOK):
        await closed.recv()
    with pytest.raises(ConnectionClosed):
        await closed.send("{}")
    assert (closed.close_code, closed.close_reason) == (1000, "bye")
    assert [message async for message in closed] == []
    cut = await new_realtime("sandbox-cut")
    await cut.send(json.dumps(user_item("Hello")))
    await cut.send('{"type": "response.create"}')
    messages: list[str] = []
    with pytest.raises(ConnectionClosedError):
        await collect(cut, messages)
    got = [json.loads(message)["type"] for message in messages]
    assert "response.output_text.delta" in got
    assert "response.done" not in got
    assert cut.close_code == 1006


async def test_a_close_wakes_a_receiver_and_a_sender_that_wait() -> None:
    connection = await new_realtime()
    await connection.recv()
    receiver = asyncio.ensure_future(connection.recv())
    await asyncio.wait([receiver], timeout=0.01)
    await connection.close(4000, "enough")
    with pytest.raises(ConnectionClosedError) as caught:
        await receiver
    assert caught.value.rcvd.code == 4000


async def test_a_client_that_does_not_read_is_held_up() -> None:
    connection = await new_realtime()
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while True:
            await connection.send('{"type": "input_audio_buffer.clear"}')
            sent += 1

    sender = asyncio.ensure_future(flood())
    await until(lambda: sent >= 511)
    done, _ = await asyncio.wait([sender], timeout=0.05)
    assert not done
    assert sent == 511  # and the greeting
    await connection.close()
    with pytest.raises(ConnectionClosedOK):
        await sender


async def test_a_cancelled_receiver_loses_no_event() -> None:
    connection = await new_realtime(pace=Pace(event_s=0.2))
    assert json.loads(await connection.recv())["type"] == "session.created"
    await connection.send(json.dumps(user_item("Hello")))
    first = await connection.recv()
    receiver = asyncio.ensure_future(connection.recv())
    await asyncio.wait([receiver], timeout=0.001)
    receiver.cancel()
    try:
        second = await receiver  # which came before, on a machine that is busy
    except asyncio.CancelledError:
        second = await connection.recv()
    assert json.loads(first)["type"] == "conversation.item.added"
    assert json.loads(second)["type"] == "conversation.item.done"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/v1/realtime", 400),
        (b"/v1/realtime?model=sandbox-429", 429),
        (b"/v1/realtime?model=sandbox-401", 401),
        (b"/v1/chat/completions", 404),
    ],
)
async def test_a_refused_handshake_has_status_headers_and_body(target: bytes, status: int) -> None:
    with pytest.raises(InvalidStatus) as caught:
        await connect_realtime(target, [])
    response = caught.value.response
    assert response.status_code == status
    assert json.loads(response.body)["error"]["message"]
    assert int(response.headers["content-length"]) == len(response.body)
    assert (response.headers.get("retry-after") == "1") == (status == 429)


async def test_a_key_offered_as_a_subprotocol_is_not_accepted() -> None:
    offered = ["openai-insecure-api-key.sk-sandbox"]
    connection = await connect_realtime(b"/v1/realtime?model=m", offered, pace=NO_PAUSE)
    assert connection.subprotocol is None


@contextlib.asynccontextmanager
async def live_sdk(sandbox: Sandbox) -> AsyncIterator[AsyncOpenAI]:
    """Give the SDK a real WebSocket server whose other side is the sandbox, joined as a relay would."""

    async def join(server: ServerConnection) -> None:
        connection = await connect_realtime(server.request.path.encode(), [], sandbox=sandbox, pace=NO_PAUSE)

        async def upward() -> None:
            async for message in server:
                await connection.send(message)
            await connection.close()

        sender = asyncio.ensure_future(upward())
        async for message in connection:
            await server.send(message)
        await sender

    async with serve(join, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        transport = SandboxTransport(sandbox=sandbox, pace=NO_PAUSE)
        async with new_sdk(transport, websocket_base_url=f"ws://127.0.0.1:{port}/v1") as sdk:
            yield sdk


async def test_the_official_realtime_client_talks_with_it() -> None:
    async with live_sdk(Sandbox()) as sdk, sdk.realtime.connect(model="gpt-realtime") as connection:
        await connection.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        await connection.conversation.item.create(item=user_item("Hello 你好")["item"])
        await connection.response.create()
        text = ""
        async for event in connection:
            text += event.delta if event.type == "response.output_text.delta" else ""
            if event.type == "response.done":
                break
    assert "Hello 你好" in text
    assert event.response.status == "completed"


async def test_the_official_client_has_responses_over_a_websocket() -> None:
    sandbox = Sandbox()
    async with live_sdk(sandbox) as sdk:
        asked = {"model": "m", "input": "Hello 你好"}
        streamed = [event.to_dict() async for event in await sdk.responses.create(**asked, stream=True)]
        async with sdk.responses.connect() as connection:
            await connection.response.create(**asked)
            events = []
            while not events or events[-1]["type"] != "response.completed":
                events.append((await connection.recv()).to_dict())
            await connection.response.create(model="sandbox-429", input="x")
            error = await connection.recv()
        assert events == streamed
        assert (error.type, error.status) == ("error", 429)
        assert (await sdk.responses.retrieve(events[-1]["response"]["id"])).output_text


async def test_responses_over_a_websocket_name_their_lane() -> None:
    connection = await connect_realtime(b"/v1/responses", [], pace=NO_PAUSE)
    create = {"type": "response.create", "model": "m", "input": "x", "stream_id": "a"}
    events = await told(connection, create, create | {"generate": False})
    for event in events:
        strictly(ResponsesServerEvent, event)
        assert event["stream_id"] == "a"
    assert events[-1]["response"]["output"] == []
    await connection.send("nonsense")
    strictly(ResponsesServerEvent, json.loads(await connection.recv()))


async def test_a_response_over_a_websocket_goes_on_from_its_last_though_it_is_not_stored() -> None:
    connection = await connect_realtime(b"/v1/responses", [], pace=NO_PAUSE)
    create = {"type": "response.create", "model": "m", "input": "x", "store": False}
    first = (await told(connection, create))[-1]["response"]["id"]
    second = (await told(connection, create | {"previous_response_id": first}))[-1]["response"]["id"]
    assert second != first
    await connection.send(json.dumps(create | {"previous_response_id": first}))
    assert json.loads(await connection.recv())["error"]["code"] == "previous_response_not_found"
