"""The practice upstream's responses: streamed, stored, and with tools."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent

from gateway.tests.sandbox_clients import WEATHER, events_in, strictly


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"instructions": "Be kind.", "metadata": {"a": "b"}},
        {"max_output_tokens": 3},
        {"text": {"format": {"type": "json_schema", "name": "w", "schema": WEATHER["parameters"]}}},
        {"tools": [{"type": "function", "strict": True, **WEATHER}]},
        {"tools": [{"type": "custom", "name": "shout"}]},
        {"tools": [{"type": "web_search"}]},
    ],
)
async def test_responses_streamed_end_with_what_is_answered_whole(
    http: httpx.AsyncClient, options: dict[str, Any]
) -> None:
    asked = {"model": "gpt-4o-mini", "input": "Hello 你好 👋", **options}
    whole = (await http.post("/v1/responses", json=asked)).json()
    strictly(Response, whole)
    answer = await http.post("/v1/responses", json=asked | {"stream": True})
    events = events_in(answer.text)
    assert answer.text.startswith("event: response.created\n")
    for number, event in enumerate(events):
        strictly(ResponseStreamEvent, event)
        assert event["sequence_number"] == number
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-2:] == ["response.output_item.done", f"response.{whole['status']}"]
    assert events[-1]["response"] == whole
    assert events[-2]["item"] == whole["output"][0]
    item = whole["output"][0]
    said = item["content"][0]["text"] if item["type"] == "message" else item.get("arguments") or item["input"]
    assert "".join(event["delta"] for event in events if event["type"].endswith(".delta")) == said
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert ("max_output_tokens" in options) == (whole["status"] == "incomplete")


async def test_the_sdk_streams_a_response_into_its_text(sdk: AsyncOpenAI) -> None:
    async with sdk.responses.stream(model="m", input="Hello 你好") as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert "You said: Hello 你好" in final.output_text


async def test_a_response_reads_parts_and_answers_a_tool(sdk: AsyncOpenAI) -> None:
    parts = [{"type": "input_text", "text": "Look"}, {"type": "input_image", "image_url": "data:,"}]
    seen = await sdk.responses.create(model="m", input=[{"role": "user", "content": parts}])
    assert "1 × image" in seen.output_text
    tools = [{"type": "function", "strict": True, **WEATHER}]
    called = await sdk.responses.create(model="m", input="How is it?", tools=tools)
    call = called.output[0]
    items = [
        {"role": "user", "content": "How is it?"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "18 °C"},
    ]
    last = await sdk.responses.create(model="m", input=items, tools=tools)
    assert "The tool answered: 18 °C" in last.output_text


async def test_a_stored_response_can_be_retrieved_replayed_and_deleted(sdk: AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="m", input=[{"role": "user", "content": "Hello"}])
    assert await sdk.responses.retrieve(made.id) == made
    replayed = [event async for event in await sdk.responses.retrieve(made.id, stream=True, starting_after=3)]
    assert replayed[0].sequence_number == 4
    assert replayed[-1].type == "response.completed"
    items = [item async for item in sdk.responses.input_items.list(made.id)]
    assert items[0].content[0].text == "Hello"
    count = await sdk.responses.input_tokens.count(model="m", input="Hello")
    assert count.input_tokens == made.usage.input_tokens
    await sdk.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made.id)
    unkept = await sdk.responses.create(model="m", input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(unkept.id)


async def test_256_responses_are_kept_the_newest(http: httpx.AsyncClient) -> None:
    made = [
        (await http.post("/v1/responses", json={"model": "m", "input": f"{number}"})).json()["id"]
        for number in range(257)
    ]
    statuses = [(await http.get(f"/v1/responses/{name}")).status_code for name in (made[0], made[1], made[256])]
    assert statuses == [404, 200, 200]


async def test_a_response_goes_on_from_one_that_is_kept_and_from_no_other(sdk: AsyncOpenAI) -> None:
    first = await sdk.responses.create(model="m", input="Hello")
    second = await sdk.responses.create(model="m", input="And then?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    await sdk.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match=f"Previous response with id '{first.id}' not found") as caught:
        await sdk.responses.create(model="m", input="And then?", previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_who_asks_for_what_another_worker_may_have_is_told_so(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="in the memory of one worker"):
        await sdk.responses.retrieve("resp_of_another")
    with pytest.raises(openai.NotFoundError, match="in the memory of one worker"):
        await sdk.files.retrieve("file-of-another")
