"""The practice upstream's images, speech, transcriptions and moderations."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import ImagesResponse, ModerationCreateResponse
from openai.types.audio import Transcription, TranscriptionDiarized, TranscriptionVerbose, Translation

from gateway.tests.sandbox_clients import events_in, strictly


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
