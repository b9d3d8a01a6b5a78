from __future__ import annotations

import itertools
import json
import timeit
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.events import Usage
from gateway.endpoints import Meter, endpoint_of
from gateway.tests.usage_answers import (
    CHAT,
    CHAT_READ,
    CHAT_REPLY,
    CHAT_STREAM,
    CHAT_USAGE,
    EDITS,
    EMBEDDINGS,
    IMAGES,
    JSON,
    RESPONSE,
    RESPONSE_READ,
    RESPONSE_STREAM,
    RESPONSES,
    SPEECH,
    SSE,
    TRANSCRIPTIONS,
    chunk,
    dumps,
    events,
    read,
    reader,
    short_id,
)
from gateway.usage import Reading, SseReader, reader_for

# Streams


@pytest.mark.parametrize("cut_every", [1, 2, 3, 50, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stream_tells_usage_wherever_the_network_cuts(cut_every: int, end: str) -> None:
    stream = b"\xef\xbb\xbf: hi\n\n" + CHAT_STREAM.replace(b"\n", end.encode()) + b": bye\n\n"
    reading = read(CHAT, stream, SSE, cut_every=cut_every)
    assert reading == Reading(CHAT_READ, "gpt-4o-2024-08-06", "default", is_complete=True)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=20))
def test_a_stream_of_responses_tells_usage_wherever_the_network_cuts(cuts: list[int]) -> None:
    reading = reader(RESPONSES, SSE)
    borders = [0, *sorted(cut % len(RESPONSE_STREAM) for cut in cuts), len(RESPONSE_STREAM)]
    for start, end in itertools.pairwise(borders):
        reading.feed(RESPONSE_STREAM[start:end])
    whole = Reading(RESPONSE_READ, "gpt-5-2025-08-07", "priority", is_complete=True, object_id="resp_67")
    assert reading.result() == whole
    assert reading.result() == whole


def test_a_stream_that_is_cut_tells_the_truth_or_nothing() -> None:
    whole_at = CHAT_STREAM.index(b"data: [DONE]") - 2
    for end in range(len(CHAT_STREAM)):
        reading = read(CHAT, CHAT_STREAM[:end], SSE, is_whole=False)
        assert reading.usage == (CHAT_READ if end >= whole_at else None)
        assert reading.is_complete == (end >= whole_at + 2 + len(b"data: [DONE]"))


def test_the_last_usage_wins_and_none_is_added_up() -> None:
    growing = [chunk("x", usage=CHAT_USAGE | {"completion_tokens": n}) for n in range(5)]
    assert read(CHAT, events(*growing), SSE).usage == Usage(
        input_tokens=86, cached_input_tokens=1920, output_tokens=4, reasoning_tokens=4
    )
    broken = chunk("x", usage={"prompt_tokens": -1, "completion_tokens": 1})
    assert read(CHAT, events(*growing, chunk("y", usage=None), broken), SSE).usage is not None


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"data\n\n",
        b"data: {\n\n",
        b"data: null\n\ndata: 7\n\n",
        b'event: x\nusage: {"prompt_tokens":1}\n\n',
        b': {"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n',
        events(chunk('"usage":{"prompt_tokens":1,"completion_tokens":1}')),
        events({"choices": [{"usage": CHAT_USAGE}]}),
        events({"type": "response.output_text.done", "response": 7, "x": "_tokens"}),
        b'data: {"usage":{"prompt_tokens":1},"x":' + b"[" * 90_000 + b"\n\n",
        b"\xff\x00\r\r\n\n" * 100,
    ],
    ids=short_id,
)
def test_a_stream_without_usage_has_none_and_is_never_an_exception(stream: bytes) -> None:
    for cut_every in (1, 7, 1 << 20):
        reading = read(RESPONSES, stream[:1000] if cut_every == 1 else stream, SSE, cut_every=cut_every)
        assert reading.usage in (None, Usage(input_tokens=1))
        assert not read(CHAT, stream, SSE).is_complete


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"data: ", b'{"usage":', b"\n\n", b"\r", b"[DONE]"])))
def test_garbage_is_no_exception(chunks: list[bytes]) -> None:
    for content_type in (JSON, SSE):
        reading = reader(CHAT, content_type)
        for part in chunks:
            reading.feed(part)
        reading.result()
        reading.output_sample()


def test_an_event_of_several_data_lines_is_one() -> None:
    lines = json.dumps(chunk("", choices=[], usage=CHAT_USAGE), indent=1).splitlines()
    stream = "\n".join(f"data: {line}" for line in lines) + "\n\ndata: [DONE]\n\n"
    assert read(CHAT, stream.encode(), SSE).usage == CHAT_READ


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
@pytest.mark.parametrize("size", [10, 100_000, 900_000])
@pytest.mark.parametrize("cut_every", [5000, 1 << 16, 1 << 30])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_each_end_of_a_response_is_read_however_long_it_is(status: str, size: int, cut_every: int, end: bytes) -> None:
    output = [{"type": "message", "usage": {"input_tokens": 3}, "content": 'x"{' * size}]
    last = {"type": f"response.{status}", "response": RESPONSE | {"output": output}, "sequence_number": 9}
    created = {"type": "response.created", "response": RESPONSE | {"usage": None}}
    stream = events(created, last, named=True) + b'event: x\ndata: {"type":"x"}\n\n'
    assert read(RESPONSES, stream.replace(b"\n", end), SSE, cut_every=cut_every) == Reading(
        RESPONSE_READ, "gpt-5-2025-08-07", "priority", is_complete=True, object_id="resp_67"
    )


@pytest.mark.parametrize("offset", range(-3, 4))
def test_an_event_behind_a_long_one_is_read_wherever_the_bound_falls(offset: int) -> None:
    long = events({"type": "x", "y": "y" * (300_000 + offset)})
    stream = long + events(chunk("", choices=[], usage=CHAT_USAGE), "[DONE]")
    for border in range(len(long) - 4, len(long) + 4):
        reading = reader(CHAT, SSE)
        reading.feed(stream[:border])
        reading.feed(stream[border:])
        result = reading.result()
        assert (result.usage, result.is_complete) == (CHAT_READ, True)
        done = reader(CHAT, SSE)
        ended = long + b"data: [DONE]\n\n"
        done.feed(ended[:border])
        done.feed(ended[border:])
        assert done.result().is_complete


def test_a_failed_response_without_usage_is_an_end() -> None:
    failed = {"type": "response.failed", "response": RESPONSE | {"usage": None, "status": "failed"}}
    reading = read(RESPONSES, RESPONSE_STREAM.partition(b"event: response.completed")[0] + events(failed), SSE)
    assert (reading.usage, reading.is_complete, reading.model) == (None, True, "gpt-5-2025-08-07")
    assert reading.has_failed


@pytest.mark.parametrize(
    ("path", "last", "usage"),
    [
        (
            IMAGES,
            {
                "type": "image_generation.completed",
                "b64_json": "A" * 900_000,
                "usage": {"input_tokens": 5, "output_tokens": 6, "input_tokens_details": {"text_tokens": 5}},
            },
            Usage(input_tokens=5, image_output_tokens=6, images=1),
        ),
        (EDITS, {"type": "image_edit.completed", "b64_json": "A", "usage": None}, Usage(images=1)),
        (
            TRANSCRIPTIONS,
            {
                "type": "transcript.text.done",
                "text": "x",
                "usage": {
                    "type": "tokens",
                    "input_tokens": 14,
                    "output_tokens": 45,
                    "input_token_details": {"text_tokens": 0, "audio_tokens": 14},
                },
            },
            Usage(audio_input_tokens=14, output_tokens=45),
        ),
        (
            TRANSCRIPTIONS,
            {"type": "transcript.text.done", "text": "x", "usage": {"type": "duration", "seconds": 7}},
            Usage(seconds=7),
        ),
        (
            SPEECH,
            {"type": "speech.audio.done", "usage": {"input_tokens": 14, "output_tokens": 101}},
            Usage(input_tokens=14, audio_output_tokens=101),
        ),
    ],
    ids=short_id,
)
def test_streams_of_media_end_with_their_usage(path: bytes, last: dict[str, Any], usage: Usage) -> None:
    before = [{"type": "x.partial", "b64_json": "B" * 400_000}, *({"type": "x.delta", "delta": "a"} for _ in range(9))]
    for cut_every in (10_000, 1 << 30):
        reading = read(path, events(*before, last, named=True), SSE, cut_every=cut_every)
        assert (reading.usage, reading.is_complete) == (usage, True)


def test_the_usage_of_a_run_is_not_that_of_its_steps() -> None:
    step = {"id": "step_1", "object": "thread.run.step", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    run = {"id": "run_1", "object": "thread.run", "model": "gpt-4o", "usage": CHAT_USAGE}
    reading = read(b"/v1/threads/runs", events(step, run, "[DONE]"), SSE)
    assert (reading.usage, reading.model, reading.is_complete) == (CHAT_READ, "gpt-4o", True)
    assert read(b"/v1/threads/runs", events(step), SSE).usage is None


@pytest.mark.parametrize("cut_every", [50, 1 << 20])
def test_a_stream_of_images_ends_with_the_last_that_was_asked_for(cut_every: int) -> None:
    reading = SseReader(Meter.IMAGES, max_sample_bytes=0)
    reading.images_asked = 2
    usage = {"input_tokens": 10, "output_tokens": 90, "total_tokens": 100}
    completed = events({"type": "image_generation.completed", "b64_json": "AAAA", "usage": usage}, named=True)
    for images in (1, 2):
        for at in range(0, len(completed), cut_every):
            reading.feed(completed[at : at + cut_every])
        assert reading.has_ended() == (images == 2)
    found = reading.result()
    assert found.usage is not None
    assert (found.usage.images, found.is_complete) == (2, True)


def test_only_a_usage_is_missing_behind_the_reason_for_an_end() -> None:
    reading = reader(CHAT, SSE)
    for finish_reason, usage, is_finishing in ((None, None, False), ("stop", None, True), (None, CHAT_USAGE, False)):
        reading.feed(events(chunk("x", choices=[{"delta": {}, "finish_reason": finish_reason}], usage=usage)))
        assert reading.is_finishing() == is_finishing


# Text for an estimate


def test_the_text_of_a_stream_without_usage_is_kept() -> None:
    tool = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a":'}}]}
    halves = [b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n', b'data: {"choices":[{"delta":{"content":']
    reading = reader(CHAT, SSE)
    body = events(chunk("Hel"), chunk('lo "x\\\n'), chunk("", choices=[{"delta": tool}]))
    reading.feed(body + halves[0] + halves[1] + b'"\\ude00')
    reading.result()
    sample = reading.output_sample()
    assert sample.text == 'Hello "x\\\nf{"a":😀'
    assert sample.seen_bytes == sample.kept_bytes


def test_text_is_dropped_once_usage_is_known() -> None:
    for path, body, kind in ((CHAT, CHAT_STREAM, SSE), (CHAT, dumps(CHAT_REPLY), JSON)):
        reading = reader(path, kind)
        reading.feed(body)
        assert reading.output_sample().text == ""


def test_what_is_kept_is_bounded_and_the_rest_is_counted() -> None:
    event = events(chunk("x" * 100))
    for kind in (SSE, JSON):
        reading = reader_for(endpoint_of("POST", CHAT), kind, max_sample_bytes=1000)
        assert reading is not None
        for _ in range(2000):
            reading.feed(event)
        sample = reading.output_sample()
        assert sample.kept_bytes <= 1000
        assert sample.text.startswith("x" * 100)
        assert sample.seen_bytes == (2000 * len(event) if kind == SSE else sample.seen_bytes)


def test_the_text_of_json_and_of_responses_is_kept() -> None:
    without = {name: value for name, value in CHAT_REPLY.items() if name != "usage"}
    reading = reader(CHAT)
    reading.feed(dumps(without))
    assert reading.output_sample().text == 'Say "usage": {"prompt_tokens": 7}} \\'
    stream = RESPONSE_STREAM.partition(b"event: response.completed")[0]
    reading = reader(RESPONSES, SSE)
    reading.feed(stream)
    assert reading.output_sample().text == "Hi, {you}!"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("cut_every", [7, 1000, 1 << 20])
def test_of_a_response_only_what_the_model_writes_is_kept(end: bytes, cut_every: int) -> None:
    request = {"instructions": "Be brief. " * 4000, "tools": [{"description": 'say {"delta":"no"}'}], "output": []}
    begun = events(
        {"type": "response.created", "response": RESPONSE | request | {"usage": None}},
        {"type": "response.in_progress", "response": RESPONSE | request | {"usage": None}},
        {"type": "response.output_text.delta", "delta": "Hi, "},
        {"type": "response.image_generation_call.partial_image", "partial_image_b64": "A" * 300_000},
        {"type": "response.output_text.delta", "delta": "you!"},
        {"type": "response.output_text.done", "text": "Hi, you!"},
        named=True,
    ).replace(b"\n\n", end)
    reading = reader(RESPONSES, SSE)
    for at in range(0, len(begun), cut_every):
        reading.feed(begun[at : at + cut_every])
    reading.result()
    sample = reading.output_sample()
    assert sample.text == "Hi, you!"
    assert sample.seen_bytes == sample.kept_bytes < 1000


def test_a_file_in_a_stream_is_no_text() -> None:
    reading = reader(CHAT, SSE)
    picture = chunk(
        "", choices=[{"delta": {"images": [{"image_url": {"url": "data:image/png;base64," + "A" * 300_000}}]}}]
    )
    reading.feed(events(chunk("Here:"), picture))
    reading.result()
    assert reading.output_sample().seen_bytes < 1000


# Costs


def us_per_call(call: Any, *, number: int) -> float:
    return min(timeit.repeat(call, number=number, repeat=10)) / number * 1e6


def test_a_chunk_costs_microseconds_and_a_megabyte_a_millisecond() -> None:
    piece = events(chunk("Hello", usage=None))
    reading = reader(CHAT, SSE)
    assert us_per_call(lambda: reading.feed(piece), number=200) < 5
    body = b'{"data":[{"b64_json":"' + b"A" * (1 << 20)
    for path in (IMAGES, EMBEDDINGS):
        reading = reader(path)
        reading.feed(body)
        assert us_per_call(lambda reading=reading: reading.feed(body), number=3) < 2000


def test_memory_stays_bounded_on_a_large_answer() -> None:
    reading = reader(EMBEDDINGS)
    for _ in range(2000):
        reading.feed(b"0.0123456," * 1000)
    assert deep_size(reading) < 1 << 20
    stream = reader(CHAT, SSE)
    for _ in range(2000):
        stream.feed(b"data: 0.0123456," * 1000)
    assert deep_size(stream) < 1 << 20


def deep_size(value: Any) -> int:
    """Return the bytes of text that an object holds, however deep."""
    if isinstance(value, bytes | bytearray):
        return len(value)
    if isinstance(value, dict):
        return sum(map(deep_size, value.values()))
    if hasattr(value, "__dict__"):
        return deep_size(vars(value))
    if hasattr(value, "__slots__"):
        return sum(deep_size(getattr(value, name, None)) for name in value.__slots__)
    if isinstance(value, list | tuple) or type(value).__name__ == "deque":
        return sum(map(deep_size, value))
    return 0
