from __future__ import annotations

import json
import timeit
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.events import Usage
from gateway.usage import RealtimeReader, RealtimeReading


def short_id(value: object) -> str:
    return repr(value)[:40]


USAGE = {
    "total_tokens": 253,
    "input_tokens": 132,
    "output_tokens": 121,
    "input_token_details": {"text_tokens": 119, "audio_tokens": 13, "image_tokens": 0, "cached_tokens": 64},
    "output_token_details": {"text_tokens": 30, "audio_tokens": 91},
}
READ = Usage(input_tokens=55, cached_input_tokens=64, audio_input_tokens=13, output_tokens=30, audio_output_tokens=91)
TWICE = Usage(
    input_tokens=110, cached_input_tokens=128, audio_input_tokens=26, output_tokens=60, audio_output_tokens=182
)
TRANSCRIBED = {
    "type": "conversation.item.input_audio_transcription.completed",
    "event_id": "event_2",
    "item_id": "item_1",
    "content_index": 0,
    "transcript": 'say "usage"',
    "usage": {
        "type": "tokens",
        "total_tokens": 22,
        "input_tokens": 13,
        "input_token_details": {"text_tokens": 0, "audio_tokens": 13},
        "output_tokens": 9,
    },
}


def done(identity: str | None, usage: Any = USAGE, kind: str = "response.done", **members: Any) -> str:
    response = {"object": "realtime.response", "id": identity, "status": "completed", "output": [], "usage": usage}
    return json.dumps({"type": kind, "event_id": "event_1", "response": response | members})


def fed(*messages: str | bytes, model: str = "gpt-realtime") -> RealtimeReader:
    reader = RealtimeReader(model)
    for message in messages:
        reader.feed(message)
    return reader


def test_the_responses_of_a_session_are_added_up_each_of_them_once() -> None:
    reader = fed(done("resp_1"), done("resp_1").encode(), done("resp_2"), done("resp_3", usage=None))
    assert reader.take() == [RealtimeReading(TWICE, "gpt-realtime")]


def test_a_session_is_settled_in_parts() -> None:
    reader = fed(done("resp_1"))
    assert reader.take() == [RealtimeReading(READ, "gpt-realtime")]
    assert reader.take() == []
    reader.feed(done("resp_1"))
    reader.feed(done("resp_2"))
    assert reader.take() == [RealtimeReading(READ, "gpt-realtime")]


def test_responses_without_an_id_are_all_counted() -> None:
    assert fed(done(None), done(None)).take() == [RealtimeReading(TWICE, "gpt-realtime")]


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
def test_responses_over_a_socket_are_counted_by_their_own_model(kind: str) -> None:
    usage = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 2}
    read = Usage(input_tokens=5, cached_input_tokens=4, output_tokens=2)
    one = done("resp_1", usage, kind, model="gpt-5", service_tier="flex")
    two = done("resp_2", usage, kind, model="gpt-5-mini")
    assert fed(one, two, one, model="").take() == [
        RealtimeReading(read, "gpt-5", "flex"),
        RealtimeReading(read, "gpt-5-mini"),
    ]


@pytest.mark.parametrize(
    "session",
    [
        {"model": "gpt-realtime-mini", "audio": {"input": {"transcription": {"model": "whisper-1"}}}},
        {"model": "gpt-realtime-mini", "input_audio_transcription": {"model": "whisper-1", "language": "en"}},
    ],
    ids=short_id,
)
@pytest.mark.parametrize("kind", ["session.created", "transcription_session.updated"])
def test_what_a_session_writes_down_is_counted_for_the_model_that_does(session: dict[str, Any], kind: str) -> None:
    created = json.dumps({"type": kind, "event_id": "e", "session": session})
    message = json.dumps(TRANSCRIBED)
    again = json.dumps(TRANSCRIBED | {"content_index": 1})
    assert fed(created, message, message, done("resp_1"), again).take() == [
        RealtimeReading(Usage(audio_input_tokens=26, output_tokens=18), "whisper-1", is_transcription=True),
        RealtimeReading(READ, "gpt-realtime-mini"),
    ]


def test_a_transcription_may_be_counted_in_seconds() -> None:
    message = json.dumps(TRANSCRIBED | {"usage": {"type": "duration", "seconds": 3.5}})
    assert fed(message).take() == [RealtimeReading(Usage(seconds=3.5), is_transcription=True)]


def test_a_live_session_says_its_seconds_again_and_again() -> None:
    def seconds(kind: str, total: float) -> str:
        return json.dumps({"type": kind, "event_id": "e", "usage": {"seconds": total}})

    reader = fed(seconds("session.usage.updated", 10), seconds("session.usage.updated", 25))
    assert reader.take() == [RealtimeReading(Usage(seconds=25), "gpt-realtime")]
    reader.feed(seconds("session.closed", 31.5))
    reader.feed(seconds("session.closed", 31.5))
    assert reader.take() == [RealtimeReading(Usage(seconds=6.5), "gpt-realtime")]


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        b"\xff\x00",
        "\ud800",
        json.dumps({"type": "response.created", "response": {"id": "r", "usage": USAGE}}),
        json.dumps({"type": "response.output_text.delta", "delta": done("resp_1")}),
        json.dumps({"type": "response.done", "response": 7}),
        json.dumps({"type": "response.done", "usage": USAGE}),
        json.dumps({"type": ["response.done"], "response": {"usage": USAGE}}),
        json.dumps({"type": "session.created", "session": {"audio": 7}}),
        json.dumps({"type": "x", "y": {"type": "response.done", "response": {"usage": USAGE}}}),
        done("r", {"input_tokens": -1, "output_tokens": 1}),
        '{"type":"response.done","response":' + "[" * 100_000,
    ],
    ids=short_id,
)
def test_other_messages_count_for_nothing(message: str | bytes) -> None:
    assert fed(message).take() == []


@settings(deadline=None)
@given(st.text() | st.binary())
def test_garbage_is_no_exception(message: str | bytes) -> None:
    assert fed(message).take() == []


def test_a_long_session_keeps_no_more_than_it_must() -> None:
    reader = RealtimeReader()
    for number in range(10_000):
        reader.feed(done(f"resp_{number}", model=f"model-{number}"))
    assert len(reader._seen) <= 4096
    taken = reader.take()
    assert len(taken) <= 20
    assert sum(reading.usage.input_tokens for reading in taken) == 10_000 * READ.input_tokens


def test_a_piece_of_audio_costs_next_to_nothing() -> None:
    audio = json.dumps({"type": "response.output_audio.delta", "event_id": "event_1", "delta": "A" * 16000})
    reader = RealtimeReader()
    assert min(timeit.repeat(lambda: reader.feed(audio), number=200, repeat=10)) / 200 * 1e6 < 2
