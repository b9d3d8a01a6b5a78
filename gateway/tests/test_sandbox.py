"""The practice upstream, asked by the official SDK and checked against its strict models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import math
import struct
import wave
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import (
    Completion,
    CreateEmbeddingResponse,
    FileObject,
    ImagesResponse,
    Model,
    ModerationCreateResponse,
)
from openai.types.audio import Transcription, TranscriptionDiarized, TranscriptionVerbose, Translation
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.realtime import RealtimeServerEvent
from openai.types.responses import Response, ResponsesServerEvent, ResponseStreamEvent
from pydantic import TypeAdapter
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus

from gateway.sandbox import Pace, Sandbox, SandboxRealtime, SandboxTransport, connect_realtime
from gateway.sandbox.fields import SandboxError
from gateway.sandbox.multipart import parse_form
from gateway.sandbox.routes.embeddings import vector_of
from gateway.sandbox.schema import example_of
from gateway.sandbox.tokens import first_tokens, pieces_of, tokens_in
from gateway.sandbox.transport import MOST_BODY_BYTES
from gateway.sandbox.trouble import TROUBLE_MODELS, Manner
from gateway.tests.calls import until

NO_PAUSE = Pace(event_s=0, slow_first_s=0, slow_event_s=0)
PATIENCE_S = 60  # only a failing test waits so long
BASE = "https://sandbox.invalid"
HELLO = [{"role": "user", "content": "Hello 你好 👩‍👩‍👧"}]
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
        "required": ["city", "days"],
    },
}


def new_sdk(transport: SandboxTransport | None = None, **options: Any) -> AsyncOpenAI:
    http_client = httpx.AsyncClient(transport=transport or SandboxTransport(pace=NO_PAUSE))
    return AsyncOpenAI(api_key="sk-sandbox", base_url=f"{BASE}/v1", http_client=http_client, max_retries=0, **options)


@pytest.fixture
async def sdk() -> AsyncIterator[AsyncOpenAI]:
    async with new_sdk() as client:
        yield client


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = SandboxTransport(pace=NO_PAUSE)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        yield client


def strictly(model: Any, value: Any) -> Any:
    """Return the value as the SDK's model; the SDK itself would accept a wrong one silently."""
    return _adapter(model).validate_python(value)


@functools.cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def events_in(body: str) -> list[dict[str, Any]]:
    """Return the JSON of each SSE event but [DONE], and check `event:` lines against it."""
    events = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        *names, data = block.split("\n")
        if data != "data: [DONE]":
            event = json.loads(data.removeprefix("data: "))
            assert names in ([], [f"event: {event.get('type')}"])
            events.append(event)
    return events


async def collect(stream: AsyncIterable[Any], into: list[Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async for item in stream:
            into.append(item)


# Models and errors


async def test_models_are_listed_with_those_for_trouble(sdk: AsyncOpenAI, http: httpx.AsyncClient) -> None:
    names = [model.id async for model in sdk.models.list()]
    assert {"gpt-4o-mini", *TROUBLE_MODELS} <= set(names)
    for item in (await http.get("/v1/models")).json()["data"]:
        strictly(Model, item)
    assert (await sdk.models.retrieve("sandbox-429")).id == "sandbox-429"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await sdk.models.retrieve("no-such-model")


async def test_a_model_name_in_a_path_is_percent_decoded(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models/gpt%2D4o")).json()["id"] == "gpt-4o"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/threads", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/a/b", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/embeddings", 405),
        ("DELETE", "/v1/chat/completions", 405),
    ],
)
async def test_what_is_not_played_says_so(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert path in answer.json()["error"]["message"]
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a":' * 5000, b'{"n":' + b"1" * 5000 + b"}"])
async def test_a_body_that_is_no_json_object_is_a_400(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": HELLO}, "model"),
        ("chat/completions", {"model": "m"}, "messages"),
        ("chat/completions", {"model": "m", "messages": []}, "messages"),
        ("chat/completions", {"model": "m", "messages": "hi"}, "messages"),
        ("chat/completions", {"model": "m", "messages": [{}]}, "messages[0].role"),
        ("chat/completions", {"model": "m", "messages": [{"role": "cat"}]}, "messages[0].role"),
        ("chat/completions", {"model": "m", "messages": HELLO, "n": 0}, "n"),
        ("chat/completions", {"model": "m", "messages": HELLO, "n": "2"}, "n"),
        ("chat/completions", {"model": "m", "messages": HELLO, "n": 129}, "n"),
        ("chat/completions", {"model": "m", "messages": HELLO, "stream": "yes"}, "stream"),
        ("chat/completions", {"model": "m" * 300, "messages": HELLO}, "model"),
        ("chat/completions", {"model": 7, "messages": HELLO}, "model"),
        ("chat/completions", {"model": "m", "messages": HELLO * 2049}, "messages"),
        ("chat/completions", {"model": "m", "messages": HELLO, "tools": [{}]}, "tools[0].type"),
        ("completions", {"model": "m"}, "prompt"),
        ("completions", {"model": "m", "prompt": ["a", 1]}, "prompt"),
        ("completions", {"model": "m", "prompt": ["a"] * 65, "n": 2}, "prompt"),
        ("completions", {"model": "m", "prompt": "a" * 100_000, "n": 100, "echo": True}, "echo"),
        ("responses", {"model": "m"}, "input"),
        ("responses", {"model": "m", "input": [{"content": "x"}]}, "input[0].role"),
        ("responses", {"model": "m", "input": "x", "instructions": "y" * 2**20}, "instructions"),
        ("embeddings", {"model": "m"}, "input"),
        ("embeddings", {"model": "m", "input": "x", "dimensions": 0}, "dimensions"),
        ("embeddings", {"model": "m", "input": "word " * 10_000}, "input"),
        ("images/generations", {"model": "dall-e-2"}, "prompt"),
        ("images/generations", {"prompt": "x", "n": 11}, "n"),
        ("audio/speech", {"model": "tts-1", "voice": "alloy"}, "input"),
        ("audio/speech", {"model": "tts-1", "input": "x"}, "voice"),
        ("audio/speech", {"model": "tts-1", "input": "x" * 4097, "voice": "alloy"}, "input"),
        ("audio/transcriptions", {"model": "whisper-1"}, "file"),
        ("moderations", {}, "input"),
        ("files", {"purpose": "batch"}, "file"),
    ],
)
async def test_a_wrong_parameter_is_named(http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    answer = await http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_body_over_32_mib_is_refused_before_and_while_it_is_read(http: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 2**20
            yield b" " * 2**20

    announced = await http.post("/v1/embeddings", headers={"content-length": str(MOST_BODY_BYTES + 1)}, content=b"")
    chunked = await http.post("/v1/embeddings", content=endless())
    assert [announced.status_code, chunked.status_code] == [413, 413]
    assert chunked.json()["error"]["code"] == "request_too_large"
    assert sent <= MOST_BODY_BYTES + 2**20


async def test_json_of_a_million_values_is_refused_unread(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/embeddings", content=b'{"input":[' + b"1," * 10**6 + b"1]}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_large")


async def test_headers_are_those_of_openai(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/models")
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["openai-organization"] == "sandbox"
    assert {"openai-processing-ms", "openai-version", "x-ratelimit-remaining-tokens"} <= set(answer.headers)
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-request-id"] == (await http.get("/v1/models")).headers["x-request-id"]
    assert answer.headers["x-request-id"] != (await http.get("/v1/models?a")).headers["x-request-id"]


async def test_head_has_the_length_and_no_body(http: httpx.AsyncClient) -> None:
    head = await http.head("/v1/models")
    assert head.status_code == 200
    assert head.content == b""
    assert int(head.headers["content-length"]) == len((await http.get("/v1/models")).content)


async def test_the_target_of_the_relay_counts_and_not_the_url() -> None:
    request = httpx.Request("GET", f"{BASE}/nowhere", extensions={"target": b"/v1/models/gpt-4o?x=1"})
    answer = await SandboxTransport().handle_async_request(request)
    assert json.loads(await answer.aread())["id"] == "gpt-4o"


# Trouble


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("sandbox-400", openai.BadRequestError),
        ("sandbox-401", openai.AuthenticationError),
        ("sandbox-429", openai.RateLimitError),
        ("sandbox-500", openai.InternalServerError),
        ("sandbox-503", openai.InternalServerError),
    ],
)
async def test_a_model_for_trouble_refuses_on_every_route(
    sdk: AsyncOpenAI, model: str, error: type[openai.APIStatusError]
) -> None:
    asked = [
        sdk.chat.completions.create(model=model, messages=HELLO, stream=True),
        sdk.completions.create(model=model, prompt="x"),
        sdk.responses.create(model=model, input="x"),
        sdk.embeddings.create(model=model, input="x"),
        sdk.images.generate(model=model, prompt="x"),
        sdk.audio.speech.create(model=model, input="x", voice="alloy"),
        sdk.audio.transcriptions.create(model=model, file=("a.mp3", b"x")),
        sdk.moderations.create(model=model, input="x"),
    ]
    for request in asked:
        with pytest.raises(error) as caught:
            await request
        assert caught.value.status_code == int(model[-3:])
        assert model in caught.value.body["message"]


async def test_a_429_says_when_to_come_back(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/embeddings", json={"model": "sandbox-429"})
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "1"
    assert answer.headers.get_list("x-ratelimit-remaining-requests") == ["0"]
    assert answer.headers["x-ratelimit-limit-tokens"]


async def test_a_cut_stream_raises_after_some_events(sdk: AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(model="any", messages=HELLO, stream=True)
    count = len([chunk async for chunk in whole])
    cut = await sdk.chat.completions.create(model="sandbox-cut", messages=HELLO, stream=True)
    got: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIConnectionError):
        await collect(cut, got)
    assert 2 <= len(got) < count


async def test_a_cut_answer_breaks_in_the_middle_of_its_announced_length() -> None:
    body = json.dumps({"model": "sandbox-cut", "messages": HELLO})
    request = httpx.Request("POST", f"{BASE}/v1/chat/completions", content=body)
    answer = await SandboxTransport(pace=NO_PAUSE).handle_async_request(request)
    got: list[bytes] = []
    with pytest.raises(httpx.ReadError):
        await collect(answer.stream, got)
    assert 0 < len(b"".join(got)) < int(answer.headers["content-length"])


async def test_hang_answers_never_and_lets_itself_be_cancelled() -> None:
    async with new_sdk(timeout=None) as sdk:
        request = asyncio.ensure_future(sdk.embeddings.create(model="sandbox-hang", input="x"))
        done, _ = await asyncio.wait([request], timeout=0.05)
        assert not done
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request


async def test_hang_and_slow_keep_to_the_caller_s_read_timeout() -> None:
    slow = SandboxTransport(pace=Pace(slow_first_s=60))
    slow_later = SandboxTransport(pace=Pace(slow_first_s=0, slow_event_s=60))
    for transport, model in ((None, "sandbox-hang"), (slow, "sandbox-slow")):
        async with new_sdk(transport, timeout=0.01) as sdk:
            with pytest.raises(openai.APITimeoutError):
                await sdk.chat.completions.create(model=model, messages=HELLO)
    async with new_sdk(slow_later, timeout=0.01) as sdk:
        stream = await sdk.chat.completions.create(model="sandbox-slow", messages=HELLO, stream=True)
        with pytest.raises(openai.APITimeoutError):
            await collect(stream, [])


def test_pauses_keep_a_long_stream_under_a_second_and_a_slow_one_slow() -> None:
    pace = Pace()
    assert pace.between(40, Manner.PLAIN) == 0.015
    assert pace.between(600, Manner.PLAIN) * 600 == pytest.approx(0.9)
    assert pace.between(600, Manner.SLOW) == 0.3


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


# Schemas, tokens, pieces, forms


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "format": "date"}, "2025-01-01"),
        ({"type": "string", "maxLength": 3}, "san"),
        ({"type": "string", "minLength": 20}, "sandbox value-------"),
        ({"enum": ["b", "a"]}, "b"),
        ({"const": {"x": 1}}, {"x": 1}),
        ({"type": "integer", "exclusiveMinimum": 4, "multipleOf": 4}, 8),
        ({"type": "number", "maximum": 0.25}, 0.25),
        ({"type": ["null", "string"]}, None),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 0}, []),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}, {"a": 1, "b": 2}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 7}}}, 7),
        ({}, "sandbox value"),
    ],
)
def test_an_example_fits_its_schema(schema: dict[str, Any], value: Any) -> None:
    assert example_of(schema, param="p") == value


def test_a_schema_that_holds_itself_comes_to_an_end() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["next"],
    }
    value = example_of({"$ref": "#/$defs/node", "$defs": {"node": node}}, param="p")
    depth = 0
    while value is not None:
        value, depth = value["next"], depth + 1
    assert depth > 1


_TWINS: dict[str, Any] = {"required": ["a", "b"], "properties": {name: {"$ref": "#"} for name in "ab"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/absent"},
        {"$ref": "https://example.com/schema"},
        _TWINS,
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**9},
        {"type": "array", "minItems": 1999, "items": {"const": "x" * 1000}},
        {"type": "number", "minimum": 1e308, "multipleOf": 1e-308},
    ],
)
def test_a_hopeless_schema_is_a_400_and_no_work(schema: dict[str, Any]) -> None:
    with pytest.raises(SandboxError) as caught:
        example_of(schema, param="p")
    assert (caught.value.status, caught.value.param) == (400, "p")


@given(st.lists(st.text(max_size=3) | st.sampled_from(["a ", "你", "👩\u200d👧", "葛\U000e0100"])), st.integers(1, 6))
def test_pieces_joined_are_the_text(parts: list[str], at_most: int) -> None:
    text = "".join(parts)
    pieces = pieces_of(text, at_most=at_most)
    assert "".join(pieces) == text
    assert len(pieces) <= at_most


@given(st.text(), st.integers(1, 20))
def test_first_tokens_are_a_prefix_within_the_limit(text: str, limit: int) -> None:
    head = first_tokens(text, limit)
    assert text.startswith(head)
    assert tokens_in(head) == min(limit, tokens_in(text))


@given(st.lists(st.tuples(st.text("ab"), st.binary()), max_size=4))
def test_a_form_of_the_sdk_s_own_client_is_read_back(parts: list[tuple[str, bytes]]) -> None:
    request = httpx.Request("POST", BASE, files=[("f[]", (f'"{name}\\é', content)) for name, content in parts])
    body = request.read()
    content_type = request.headers.get("content-type", "multipart/form-data; boundary=x").encode()
    _, uploads = parse_form(content_type, body or b"--x--")
    assert [upload.content for upload in uploads] == [content for _, content in parts]
    assert all(upload.field == "f" and upload.filename.endswith("é") for upload in uploads)


@pytest.mark.parametrize(
    "body",
    [b"", b"--x", b"--x\r\n\r\n", b"--x\r\n\r\n\r\nbody", b"--y--", b"--x\r\na: b\r\n\r\nbody\r\n--x--"],
)
def test_a_broken_form_is_a_400(body: bytes) -> None:
    with pytest.raises(SandboxError, match="multipart"):
        parse_form(b"multipart/form-data; boundary=x", body)


def test_a_form_has_128_parts_at_most() -> None:
    part = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n'
    assert parse_form(b"multipart/form-data; boundary=x", part * 128 + b"--x--")[0] == {"a": "1"}
    with pytest.raises(SandboxError, match="128"):
        parse_form(b"multipart/form-data; boundary=x", part * 129 + b"--x--")


# Completions and embeddings


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


async def test_embeddings_are_unit_vectors_the_same_in_both_encodings(
    sdk: AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    asked = {"model": "text-embedding-3-small", "input": ["Hello 你好", "x"], "dimensions": 256}
    plain = (await http.post("/v1/embeddings", json=asked)).json()
    strictly(CreateEmbeddingResponse, plain)
    packed = (await http.post("/v1/embeddings", json=asked | {"encoding_format": "base64"})).json()
    for one, other in zip(plain["data"], packed["data"], strict=True):
        numbers = struct.unpack("<256f", base64.b64decode(other["embedding"]))
        assert one["embedding"] == pytest.approx(numbers, abs=1e-6)
        assert math.hypot(*one["embedding"]) == pytest.approx(1)
    by_sdk = await sdk.embeddings.create(**asked)  # the SDK asks for base64 and unpacks it
    assert by_sdk.data[1].embedding == pytest.approx(plain["data"][1]["embedding"], abs=1e-6)
    assert by_sdk.usage.total_tokens == by_sdk.usage.prompt_tokens == 3 + 1


async def test_embeddings_have_the_usual_number_of_dimensions(sdk: AsyncOpenAI) -> None:
    small = await sdk.embeddings.create(model="text-embedding-3-small", input=[1, 2, 3])
    large = await sdk.embeddings.create(model="text-embedding-3-large", input=[[1], [2]])
    assert len(small.data[0].embedding) == 1536
    assert [len(item.embedding) for item in large.data] == [3072, 3072]


def test_texts_that_share_words_are_near() -> None:
    cat, cats, tax = (vector_of(text, 512) for text in ("the cat sat", "a cat sat down", "quarterly tax report"))
    near = sum(map(float.__mul__, cat, cats))
    far = sum(map(float.__mul__, cat, tax))
    assert near > far + 0.2
    assert vector_of("", 1) == [1.0]


# Responses


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"instructions": "Be kind.", "previous_response_id": "resp_before", "metadata": {"a": "b"}},
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


# Images and audio


def pixels_of(image: bytes) -> bytes:
    """Return a PNG's raw rows after checking every chunk's CRC."""
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    position, content = 8, b""
    while position < len(image):
        (length,) = struct.unpack_from(">I", image, position)
        chunk = image[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", image, position + 8 + length) == (zlib.crc32(chunk),)
        content += chunk[4:] if chunk.startswith(b"IDAT") else b""
        position += 12 + length
    return zlib.decompress(content)


async def test_images_are_real_and_come_by_url_or_base64(sdk: AsyncOpenAI) -> None:
    by_url = await sdk.images.generate(model="dall-e-3", prompt="a cat", n=2)
    prefix = "data:image/png;base64,"
    assert all(image.url.startswith(prefix) and image.revised_prompt == "a cat" for image in by_url.data)
    packed = await sdk.images.generate(model="dall-e-2", prompt="a cat", response_format="b64_json")
    assert len(pixels_of(base64.b64decode(packed.data[0].b64_json))) == 64 * (1 + 64 * 3)
    gpt = await sdk.images.generate(model="gpt-image-1", prompt="a cat", size="1024x1536")
    strictly(ImagesResponse, gpt.to_dict())
    assert pixels_of(base64.b64decode(gpt.data[0].b64_json))
    assert gpt.size == "1024x1536"
    assert gpt.usage.total_tokens == gpt.usage.input_tokens + gpt.usage.output_tokens
    with pytest.raises(openai.BadRequestError, match="response_format"):
        await sdk.images.generate(model="gpt-image-1", prompt="a cat", response_format="url")


async def test_images_are_edited_varied_and_streamed(sdk: AsyncOpenAI) -> None:
    edited = await sdk.images.edit(model="gpt-image-1", image=[b"one", b"two"], prompt="a hat", n=2)
    assert len(edited.data) == 2
    assert edited.usage.input_tokens_details.image_tokens == 2 * 85
    varied = await sdk.images.create_variation(image=b"one", response_format="b64_json")
    assert pixels_of(base64.b64decode(varied.data[0].b64_json))
    for stream, name in (
        (sdk.images.generate(model="gpt-image-1", prompt="x", stream=True, partial_images=2), "image_generation"),
        (sdk.images.edit(image=b"1", prompt="x", stream=True, partial_images=2), "image_edit"),
    ):
        events = [event async for event in await stream]
        assert [event.type for event in events] == [f"{name}.partial_image"] * 2 + [f"{name}.completed"]
        assert pixels_of(base64.b64decode(events[-1].b64_json))
        for event in events:
            strictly(type(event), event.to_dict())


async def test_speech_is_a_wav_and_says_so(sdk: AsyncOpenAI) -> None:
    answer = await sdk.audio.speech.with_raw_response.create(
        model="tts-1", voice="alloy", input="Hello", response_format="mp3"
    )
    assert answer.headers["content-type"] == "audio/wav"
    with wave.open(io.BytesIO(answer.content)) as audio:
        assert (audio.getnchannels(), audio.getsampwidth(), audio.getframerate()) == (1, 2, 8000)
        assert audio.getnframes() == 0.3 * 8000
    longest = await sdk.audio.speech.create(model="tts-1", voice="alloy", input="x" * 4096)
    assert len(longest.content) == 44 + 2 * 2 * 8000


async def test_speech_by_events_is_the_same_audio(http: httpx.AsyncClient) -> None:
    asked = {"model": "gpt-4o-mini-tts", "voice": "alloy", "input": "Hello"}
    whole = (await http.post("/v1/audio/speech", json=asked)).content
    *deltas, done = events_in((await http.post("/v1/audio/speech", json=asked | {"stream_format": "sse"})).text)
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == whole
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]


async def test_transcriptions_in_every_format(sdk: AsyncOpenAI) -> None:
    speech = await sdk.audio.speech.create(model="tts-1", voice="alloy", input="Hello")
    file = ("hello 你.wav", speech.content)
    ask = sdk.audio.transcriptions.create
    plain = await ask(model="whisper-1", file=file)
    strictly(Transcription, plain.to_dict())
    assert "hello 你.wav" in plain.text
    assert plain.usage.seconds == 0.3
    verbose = await ask(model="whisper-1", file=file, response_format="verbose_json", timestamp_granularities=["word"])
    strictly(TranscriptionVerbose, verbose.to_dict())
    assert " ".join(word.word for word in verbose.words) == verbose.text == plain.text
    assert verbose.words[-1].end == verbose.duration == 0.3
    assert (await ask(model="whisper-1", file=file, response_format="text")) == plain.text + "\n"
    assert "00:00:00,000 --> 00:00:00,300" in await ask(model="whisper-1", file=file, response_format="srt")
    assert (await ask(model="whisper-1", file=file, response_format="vtt")).startswith("WEBVTT\n\n00:00:00.000")
    diarized = await ask(model="gpt-4o-transcribe-diarize", file=file, response_format="diarized_json")
    strictly(TranscriptionDiarized, diarized.to_dict())
    with pytest.raises(openai.BadRequestError, match="not compatible"):
        await ask(model="gpt-4o-transcribe", file=file, response_format="srt")


async def test_a_transcription_streams_for_the_newer_models_only(sdk: AsyncOpenAI) -> None:
    file = ("a.mp3", b"x" * 32_000)
    whole = await sdk.audio.transcriptions.create(model="gpt-4o-transcribe", file=file)
    strictly(Transcription, whole.to_dict())
    stream = await sdk.audio.transcriptions.create(model="gpt-4o-transcribe", file=file, stream=True)
    *deltas, done = [event async for event in stream]
    assert "".join(event.delta for event in deltas) == done.text == whole.text
    assert done.usage.to_dict() == whole.usage.to_dict()
    assert whole.usage.input_tokens == 20
    old = await sdk.audio.transcriptions.with_raw_response.create(model="whisper-1", file=file, stream=True)
    assert old.headers["content-type"] == "application/json"


async def test_translations_answer_in_text(sdk: AsyncOpenAI) -> None:
    plain = await sdk.audio.translations.create(model="whisper-1", file=("a.mp3", b"x" * 1600))
    strictly(Translation, plain.to_dict())
    verbose = await sdk.audio.translations.create(
        model="whisper-1", file=("a.mp3", b"x" * 1600), response_format="verbose_json"
    )
    assert (verbose.duration, verbose.text) == (0.1, plain.text)


async def test_a_moderation_flags_the_word_for_it(sdk: AsyncOpenAI) -> None:
    parts = [
        {"type": "text", "text": "SANDBOX-FLAG"},
        {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}},
    ]
    one = await sdk.moderations.create(input="hello")
    two = await sdk.moderations.create(input=["hello", "please sandbox-flag me"])
    seen = await sdk.moderations.create(input=parts)
    for answer in (one, two, seen):
        strictly(ModerationCreateResponse, answer.to_dict(use_api_names=True))
    assert [result.flagged for result in (*one.results, *two.results, *seen.results)] == [False, False, True, True]
    assert seen.results[0].categories.violence
    assert seen.results[0].category_applied_input_types.violence == ["text", "image"]


# Files


async def test_a_file_is_uploaded_listed_read_and_deleted(sdk: AsyncOpenAI) -> None:
    content = bytes(range(256)) * 10
    made = await sdk.files.create(file=('a "b" 你.bin', content, "application/pdf"), purpose="user_data")
    strictly(FileObject, made.to_dict())
    assert (made.filename, made.bytes) == ('a "b" 你.bin', len(content))
    assert await sdk.files.retrieve(made.id) == made
    answer = await sdk.files.content(made.id)
    assert answer.content == content
    assert answer.response.headers["content-type"] == "application/pdf"
    again = await sdk.files.create(file=('a "b" 你.bin', content, "application/pdf"), purpose="user_data")
    assert again == made
    assert [file.id async for file in sdk.files.list()] == [made.id]
    assert (await sdk.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError, match="No such File"):
        await sdk.files.content(made.id)


async def test_files_are_listed_in_pages_newest_first(sdk: AsyncOpenAI) -> None:
    ids = [
        (await sdk.files.create(file=(f"{number}.txt", b"x"), purpose=purpose)).id
        for number, purpose in enumerate(["batch", "vision", "batch"])
    ]
    assert [file.id async for file in sdk.files.list(limit=1)] == ids[::-1]
    assert [file.id async for file in sdk.files.list(order="asc", purpose="batch")] == [ids[0], ids[2]]
    page = await sdk.files.list(limit=1, after=ids[1])
    assert ([file.id for file in page.data], page.has_more) == ([ids[0]], False)
    with pytest.raises(openai.BadRequestError):
        await sdk.files.list(after="file-absent")


async def test_files_are_bounded_in_size_number_and_total(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="4 MiB") as caught:
        await sdk.files.create(file=("big", b"x" * (4 * 2**20 + 1)), purpose="batch")
    assert caught.value.status_code == 413
    small = [(await sdk.files.create(file=(f"{i}", b"x"), purpose="batch")).id for i in range(65)]
    assert [file.id async for file in sdk.files.list(order="asc")] == small[1:]
    large = [(await sdk.files.create(file=(f"{i}", b"x" * 4 * 2**20), purpose="batch")).id for i in range(5)]
    assert [file.id async for file in sdk.files.list(order="asc")] == large[1:]


# Any JSON at all


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["user", "function", "message", "text", "input_text", "object", "#", "json_schema", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "name", "function", "parameters", "properties", "schema"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
_PARAMETERS = st.sampled_from(
    [
        "messages",
        "prompt",
        "input",
        "n",
        "stream",
        "stream_options",
        "max_tokens",
        "stop",
        "tools",
        "tool_choice",
        "response_format",
        "text",
        "echo",
        "dimensions",
        "encoding_format",
        "voice",
        "stream_format",
        "instructions",
        "metadata",
        "conversation",
        "purpose",
        "file",
        "images",
        "store",
        "size",
        "partial_images",
        "max_output_tokens",
    ]
)
_POSTS = [
    "chat/completions",
    "completions",
    "responses",
    "responses/input_tokens",
    "embeddings",
    "images/generations",
    "images/edits",
    "images/variations",
    "audio/speech",
    "audio/transcriptions",
    "audio/translations",
    "moderations",
    "files",
]
_SOUND = {"messages": HELLO, "prompt": "x", "input": "x", "voice": "alloy", "images": [{}]}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_POSTS), st.dictionaries(_PARAMETERS, _JSON, max_size=4))
def test_any_json_gets_an_answer_or_an_error_in_shape(path: str, changes: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", **_SOUND, **changes}).encode()
    answer = Sandbox().answer("POST", f"/v1/{path}".encode(), b"application/json", body)
    if answer.status != 200:
        assert answer.status == 400
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}


# Realtime


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
