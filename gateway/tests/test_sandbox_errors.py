"""What the practice upstream refuses, and the models that make trouble on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types import Model
from openai.types.chat import ChatCompletionChunk

from gateway.sandbox import Pace, Sandbox, SandboxTransport
from gateway.sandbox.transport import MOST_BODY_BYTES
from gateway.sandbox.trouble import TROUBLE_MODELS, Manner
from gateway.tests.sandbox_clients import BASE, HELLO, NO_PAUSE, collect, new_sdk, strictly

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
