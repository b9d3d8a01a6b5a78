"""The practice upstream's chat and text completions, streamed or not, by the SDK's strict models."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.sandbox import SandboxTransport
from gateway.sandbox.tokens import tokens_in
from gateway.tests.sandbox_clients import BASE, HELLO, NO_PAUSE, WEATHER, events_in, strictly

# Chat


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"max_tokens": 5},
        {"max_completion_tokens": 1},
        {"stop": ["你"]},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": WEATHER}], "n": 2},
    ],
)
async def test_chat_streamed_says_what_chat_says(http: httpx.AsyncClient, options: dict[str, Any]) -> None:
    asked = {"model": "gpt-4o-mini", "messages": HELLO, **options}
    whole = (await http.post("/v1/chat/completions", json=asked)).json()
    strictly(ChatCompletion, whole)
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    answer = await http.post("/v1/chat/completions", json=streamed)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("data: [DONE]\n\n")
    *chunks, last = events_in(answer.text)
    for chunk in (*chunks, last):
        strictly(ChatCompletionChunk, chunk)
        assert chunk["id"] == whole["id"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert _joined(parts) == _said(choice["message"])


def _joined(parts: list[dict[str, Any]]) -> str:
    deltas = [part["delta"] for part in parts]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    return "".join(delta.get("content") or "" for delta in deltas) + "".join(map(_tool_text, calls))


def _said(message: dict[str, Any]) -> str:
    return (message["content"] or "") + "".join(map(_tool_text, message.get("tool_calls", [])))


def _tool_text(call: dict[str, Any]) -> str:
    return call.get("function", {}).get("arguments", "") + call.get("custom", {}).get("input", "")


async def test_chat_says_how_likely_each_token_was_and_streamed_the_same(http: httpx.AsyncClient) -> None:
    asked = {"model": "m", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    whole = (await http.post("/v1/chat/completions", json=asked)).json()
    strictly(ChatCompletion, whole)
    choice = whole["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == choice["message"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == choice["message"]["content"]
    for one in content:
        first, second = one["top_logprobs"]
        assert (first["token"], first["logprob"]) == (one["token"], one["logprob"])
        assert math.exp(first["logprob"]) + math.exp(second["logprob"]) <= 1
    chunks = events_in((await http.post("/v1/chat/completions", json=asked | {"stream": True})).text)
    told = [strictly(ChatCompletionChunk, chunk).choices[0].logprobs for chunk in chunks]
    assert [one.to_dict() for logprobs in told if logprobs for one in logprobs.content] == content
    plain = (await http.post("/v1/chat/completions", json=asked | {"top_logprobs": None})).json()
    assert all(one["top_logprobs"] == [] for one in plain["choices"][0]["logprobs"]["content"])


@pytest.mark.parametrize(
    ("route", "options", "param"),
    [
        ("chat/completions", {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 20, "n": 128}, "logprobs"),
        ("completions", {"prompt": "x", "logprobs": 6}, "logprobs"),
        ("completions", {"prompt": "x " * 60_000, "echo": True, "logprobs": 0}, "logprobs"),
    ],
)
async def test_logprobs_that_are_not_to_be_had_are_a_400(
    http: httpx.AsyncClient, route: str, options: dict[str, Any], param: str
) -> None:
    answer = await http.post(f"/v1/{route}", json={"model": "m", **options})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_usage_stays_out_of_a_stream_that_did_not_ask(http: httpx.AsyncClient) -> None:
    asked = {"model": "m", "messages": HELLO, "stream": True}
    chunks = events_in((await http.post("/v1/chat/completions", json=asked)).text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_chat_answers_with_the_last_message_of_the_user(sdk: AsyncOpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "second"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Grüße 你好 👋🏽"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}},
            ],
        },
    ]
    answer = await sdk.chat.completions.create(model="gpt-4o", messages=messages)
    text = answer.choices[0].message.content
    assert "Grüße 你好 👋🏽" in text
    assert "2 × image" in text
    assert "sandbox" in text
    assert "gpt-4o" in text
    assert answer.choices[0].finish_reason == "stop"


async def test_a_stream_comes_in_several_chunks_one_event_each() -> None:
    asked = {"model": "m", "messages": [{"role": "user", "content": "一二三四五六七八 👩‍👩‍👧 done"}], "stream": True}
    request = httpx.Request("POST", f"{BASE}/v1/chat/completions", content=json.dumps(asked))
    answer = await SandboxTransport(pace=NO_PAUSE).handle_async_request(request)
    assert "content-length" not in answer.headers
    chunks = [chunk async for chunk in answer.stream]
    assert len(chunks) > 10
    assert all(chunk.endswith(b"\n\n") and chunk.count(b"\n\n") == 1 for chunk in chunks)
    texts = [event["choices"][0]["delta"].get("content") or "" for event in events_in(b"".join(chunks).decode())]
    assert any("👩‍👩‍👧" in text for text in texts)


async def test_the_same_request_gets_the_same_answer_and_another_does_not(http: httpx.AsyncClient) -> None:
    asked = {"model": "m", "messages": HELLO}
    first, again, reordered, other = [
        (await http.post("/v1/chat/completions", content=json.dumps(body))).content
        for body in (asked, asked, dict(reversed(asked.items())), asked | {"user": "u"})
    ]
    assert first == again == reordered
    assert json.loads(first)["id"] != json.loads(other)["id"]


async def test_tokens_follow_the_rule_and_sum_up(sdk: AsyncOpenAI) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "12345678你"}]
    answer = await sdk.chat.completions.create(model="m", messages=messages, n=2)
    assert answer.usage.prompt_tokens == 1 + 3
    assert answer.usage.completion_tokens == sum(tokens_in(choice.message.content) for choice in answer.choices)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert answer.choices[0].message.content != answer.choices[1].message.content


async def test_max_tokens_cuts_between_characters(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="m", messages=HELLO, max_tokens=6)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "You said: Hello 你好 "  # 23 bytes; 👩 has 4
    assert answer.usage.completion_tokens == 6
    stopped = await sdk.chat.completions.create(model="m", messages=HELLO, stop="Hello")
    assert stopped.choices[0].message.content == "You said: "
    assert stopped.choices[0].finish_reason == "stop"


async def test_a_long_message_is_quoted_in_part(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 10**6}])
    assert len(answer.choices[0].message.content) < 5000
    assert answer.usage.prompt_tokens == 250_000


async def test_tools_are_called_after_a_user_and_answered_after_a_tool(sdk: AsyncOpenAI) -> None:
    tools = [
        {"type": "function", "function": {"name": "other"}},
        {"type": "function", "function": WEATHER},
    ]
    first = await sdk.chat.completions.create(model="m", messages=HELLO, tools=tools)
    assert first.choices[0].message.tool_calls[0].function.name == "other"
    choice = {"type": "function", "function": {"name": "weather"}}
    named = await sdk.chat.completions.create(model="m", messages=HELLO, tools=tools, tool_choice=choice)
    call = named.choices[0].message.tool_calls[0]
    assert named.choices[0].finish_reason == "tool_calls"
    assert named.choices[0].message.content is None
    assert json.loads(call.function.arguments) == {"city": "sandbox city", "days": 3}
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "weather"}}]},
    }
    limited = await sdk.chat.completions.create(model="m", messages=HELLO, tools=tools, tool_choice=allowed)
    assert limited.choices[0].message.tool_calls[0].function.name == "weather"
    none = await sdk.chat.completions.create(model="m", messages=HELLO, tools=tools, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    after = [
        *HELLO,
        named.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": call.id, "content": "18 °C"},
    ]
    last = await sdk.chat.completions.create(model="m", messages=after, tools=tools)
    assert "The tool answered: 18 °C" in last.choices[0].message.content
    choice = {"type": "function", "function": {"name": "absent"}}
    with pytest.raises(openai.BadRequestError):
        await sdk.chat.completions.create(model="m", messages=HELLO, tools=tools, tool_choice=choice)


async def test_a_custom_tool_gets_text_streamed_or_not(http: httpx.AsyncClient) -> None:
    asked = {"model": "m", "messages": HELLO, "tools": [{"type": "custom", "custom": {"name": "shout"}}]}
    whole = (await http.post("/v1/chat/completions", json=asked)).json()
    strictly(ChatCompletion, whole)
    assert _said(whole["choices"][0]["message"]) == HELLO[0]["content"]
    chunks = events_in((await http.post("/v1/chat/completions", json=asked | {"stream": True})).text)
    assert _joined([chunk["choices"][0] for chunk in chunks]) == HELLO[0]["content"]


async def test_a_json_schema_is_kept_to(sdk: AsyncOpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER["parameters"]}}
    answer = await sdk.chat.completions.create(model="m", messages=HELLO, response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"city": "sandbox city", "days": 3}
    plain = await sdk.chat.completions.create(model="m", messages=HELLO, response_format={"type": "json_object"})
    assert json.loads(plain.choices[0].message.content)["you_said"] == HELLO[0]["content"]
    with pytest.raises(openai.BadRequestError, match=r"json_schema\.schema"):
        await sdk.chat.completions.create(model="m", messages=HELLO, response_format={"type": "json_schema"})


# Text completions


@pytest.mark.parametrize("prompt", ["Say hi", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
async def test_completions_streamed_or_not(http: httpx.AsyncClient, prompt: Any) -> None:
    asked = {"model": "gpt-3.5-turbo-instruct", "prompt": prompt, "n": 2, "echo": True}
    whole = (await http.post("/v1/completions", json=asked)).json()
    strictly(Completion, whole)
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events_in((await http.post("/v1/completions", json=streamed)).text)
    for chunk in (*chunks, last):
        # In the API's own reference a choice's finish_reason is null until the last; its model says never.
        strictly(Completion, chunk | {"choices": []})
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == "stop"


async def test_completions_echo_and_stop(sdk: AsyncOpenAI) -> None:
    echoed = await sdk.completions.create(model="m", prompt="Once upon", echo=True)
    assert echoed.choices[0].text.startswith("Once upon\n\nYou said: Once upon")
    stopped = await sdk.completions.create(model="m", prompt="Once upon", stop="said", max_tokens=50)
    assert stopped.choices[0].text == "You "
    assert echoed.usage.prompt_tokens == 3


@pytest.mark.parametrize("top", [0, 2])
async def test_completions_say_how_likely_each_token_was_and_streamed_the_same(
    http: httpx.AsyncClient, top: int
) -> None:
    asked = {"model": "m", "prompt": "Grüße 你好 👋", "echo": True, "logprobs": top}
    whole = (await http.post("/v1/completions", json=asked)).json()
    strictly(Completion, whole)
    text, logprobs = whole["choices"][0]["text"], whole["choices"][0]["logprobs"]
    tokens = logprobs["tokens"]
    assert "".join(tokens) == text
    assert all(text.startswith(*place) for place in zip(tokens, logprobs["text_offset"], strict=True))
    likeliest = [{token: logprob} for token, logprob in zip(tokens, logprobs["token_logprobs"], strict=True)]
    if top:
        assert [len(one) for one in logprobs["top_logprobs"]] == [top] * len(tokens)
        assert all(one.items() <= two.items() for one, two in zip(likeliest, logprobs["top_logprobs"], strict=True))
    chunks = events_in((await http.post("/v1/completions", json=asked | {"stream": True})).text)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, values in logprobs.items():
        assert [value for one in told if one for value in one[name] or ()] == (values or [])
