"""OpenAI's own Python SDK through the live proxy: to the sandbox inside it, and to a real HTTP server behind it."""

from __future__ import annotations

import asyncio
import io
import struct

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gateway.sandbox import Sandbox
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy

MODEL = "gpt-4o-mini"
MESSAGES = [{"role": "user", "content": "你好, proxy 😀"}]


def played_by(sandbox: Sandbox) -> object:
    """Return a script that answers over a real connection what the sandbox would."""

    async def script(exchange: Exchange) -> None:
        request = exchange.request
        body = await exchange.read_body()
        content_type = (request.value("content-type") or "").encode()
        answer = sandbox.answer(request.method, request.target.encode(), content_type, body)
        headers = (("content-type", answer.content_type), ("x-request-id", "req_upstream"))
        if not answer.events:
            await exchange.answer(answer.body, status=f"{answer.status} X", headers=headers)
            return
        await exchange.start_stream(headers=headers)
        for event in answer.events:
            await exchange.chunk(event)
        await exchange.end_stream()

    return script


@pytest.fixture(params=["sandbox", "upstream"])
def key(request: pytest.FixtureRequest, upstream: FakeUpstream) -> str:
    upstream.script = played_by(Sandbox())  # type: ignore[assignment]
    return "sk-sandbox" if request.param == "sandbox" else "sk-test"


@pytest.fixture
def client(own_proxy: LiveProxy, key: str) -> OpenAI:
    return OpenAI(api_key=key, base_url=f"{own_proxy.url}/v1", max_retries=0, timeout=60)


def test_models(client: OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_chat_completion_whole_and_streamed_say_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "你好, proxy 😀" in streamed
    assert streamed == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-1].usage == whole.usage


def test_tools_are_called(client: OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool])
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


def test_text_completions_and_several_choices(client: OpenAI) -> None:
    assert len(client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a", n=2).choices) == 2
    assert len(client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3).choices) == 3


def test_responses_whole_and_streamed_say_the_same(client: OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="hello")
    with client.responses.stream(model=MODEL, input="hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created"
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage


def test_embeddings(client: OpenAI) -> None:
    answer = client.embeddings.create(model="text-embedding-3-small", input=["a", "b"], dimensions=8)
    assert [len(item.embedding) for item in answer.data] == [8, 8]
    assert answer.usage.prompt_tokens > 0


def test_images(client: OpenAI) -> None:
    image = client.images.generate(model="gpt-image-1", prompt="a cat").data[0]
    assert image.b64_json.startswith("iVBORw0KGgo")  # a PNG's signature


def test_speech_is_a_sound_file_and_can_be_streamed(client: OpenAI, tmp_path: object) -> None:
    with client.audio.speech.with_streaming_response.create(model="tts-1", voice="alloy", input="hello") as answer:
        data = b"".join(answer.iter_bytes())
    assert data[:4] == b"RIFF"
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8


def test_a_sound_file_is_transcribed(client: OpenAI) -> None:
    speech = client.audio.speech.create(model="tts-1", voice="alloy", input="hello").content
    answer = client.audio.transcriptions.create(model="whisper-1", file=("speech.wav", io.BytesIO(speech), "audio/wav"))
    assert answer.text


def test_moderation(client: OpenAI) -> None:
    assert client.moderations.create(input="hello").results[0].flagged is False


def test_a_file_goes_up_and_comes_down_the_same(client: OpenAI) -> None:
    content = bytes(range(256)) * 4000
    file = client.files.create(file=("data.bin", io.BytesIO(content)), purpose="user_data")
    assert file.bytes == len(content)
    assert client.files.content(file.id).read() == content
    assert file.id in [item.id for item in client.files.list()]
    assert client.files.delete(file.id).deleted


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
def test_errors_of_the_upstream_become_the_sdks_own(
    client: OpenAI, model: str, error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(model=model, messages=MESSAGES)
    assert raised.value.response.headers["x-request-id"]
    assert raised.value.body["message"]


def test_a_stream_that_is_cut_raises_instead_of_ending(own_proxy: LiveProxy) -> None:
    client = OpenAI(api_key="sk-sandbox", base_url=f"{own_proxy.url}/v1", max_retries=0, timeout=60)
    for create in (
        lambda: client.chat.completions.create(model="sandbox-cut", messages=MESSAGES, stream=True),
        lambda: client.responses.create(model="sandbox-cut", input="hello", stream=True),
        lambda: client.completions.create(model="sandbox-cut", prompt="hello", stream=True),
    ):
        with pytest.raises(openai.APIError, match="upstream"):
            list(create())


def test_an_upstream_that_hangs_meets_the_clients_own_patience(own_proxy: LiveProxy) -> None:
    client = OpenAI(api_key="sk-sandbox", base_url=f"{own_proxy.url}/v1", max_retries=0, timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="sandbox-hang", messages=MESSAGES)


async def test_the_async_client_runs_many_streams_at_once(own_proxy: LiveProxy, key: str) -> None:
    async with AsyncOpenAI(api_key=key, base_url=f"{own_proxy.url}/v1", max_retries=0, timeout=60) as client:

        async def ask(number: int) -> bool:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"number {number}!"}], stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return f"number {number}!" in text

        assert all(await asyncio.gather(*(ask(number) for number in range(30))))


def test_the_sandbox_key_is_nobodys_key_when_the_sandbox_is_off(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        answer = proxy.get("/v1/models", headers={"Authorization": "Bearer sk-sandbox"})
    assert answer.json()["target"] == "/v1/models"
    assert upstream.requests[0].value("authorization") == "Bearer sk-sandbox"
