from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.usage import RealtimeReader

CREATE = json.dumps({"type": "response.create", "model": "gpt-5", "input": "tell me"})
USAGE = {"input_tokens": 1, "output_tokens": 1}


def event(kind: str, **members: Any) -> str:
    return json.dumps({"type": kind, "event_id": "event_1"} | members)


def created(identity: str = "r1", **members: Any) -> str:
    return event("response.created", response={"id": identity, "usage": None} | members)


def done(identity: str = "r1", usage: Any = USAGE) -> str:
    return event("response.done", response={"id": identity, "usage": usage})


def text(delta: str = "hello") -> str:
    return event("response.output_text.delta", delta=delta)


def audio() -> str:
    return event("response.output_audio.delta", delta="AAAA")


def fed(*messages: str | bytes) -> RealtimeReader:
    """Return a reader that was told what a client has sent, and an upstream."""
    reader = RealtimeReader()
    for message in messages:
        kind = json.loads(message)["type"]
        if kind in ("response.create", "conversation.item.create", "input_audio_buffer.append"):
            reader.feed_up(message)
        else:
            reader.feed(message)
    return reader


@pytest.mark.parametrize(
    ("messages", "has_begun", "is_asked_for"),
    [
        ([], False, False),
        ([CREATE], False, True),
        ([CREATE.encode()], False, True),
        ([json.dumps({"input": "x" * 1000, "type": "response.create"})], False, True),
        ([json.dumps({"type": "input_audio_buffer.append", "audio": "AAAA"})], False, False),
        ([CREATE, event("error")], False, False),
        ([CREATE, CREATE, event("error")], False, True),
        ([CREATE, created()], True, True),
        ([created()], True, True),
        ([text()], True, True),
        ([text(), event("error")], True, True),
        ([audio()], True, True),
        ([event("conversation.item.input_audio_transcription.delta", delta="x")], False, False),
        ([CREATE, created(), text(), done()], False, False),
        ([CREATE, done()], False, False),
        ([created("r1"), created("r2"), done("r1")], True, True),
        ([created("r1"), done("r1"), created("r2"), done("r1")], True, True),
        ([created("r1"), created("r2"), done("r2"), done("r1")], False, False),
        ([created("r1"), done("another")], False, False),
        ([CREATE, created(), event("error")], True, True),
    ],
)
def test_what_is_in_progress(messages: list[str | bytes], has_begun: bool, is_asked_for: bool) -> None:
    unfinished = fed(*messages).unfinished
    assert (unfinished.has_begun, unfinished.is_asked_for) == (has_begun, is_asked_for)


def test_what_was_asked_for_and_written_is_known_once() -> None:
    reader = fed(CREATE, created(model="gpt-5-2026", service_tier="flex"), text("hello "), text("w\u00f6rld"), audio())
    found = reader.take_unfinished()
    assert (found.model, found.service_tier, found.prompt) == ("gpt-5-2026", "flex", CREATE.encode())
    assert found.output.text == "hello w\u00f6rld"
    assert (found.seen_bytes, found.kept_bytes) == (len(CREATE), len(CREATE))
    again = reader.take_unfinished()
    assert (again.prompt, again.output.text) == (b"", "")
    assert not reader.unfinished.is_asked_for


def test_a_piece_whose_type_stands_at_its_end_is_one_all_the_same() -> None:
    late = json.dumps({"delta": "x" * 500, "type": "response.output_text.delta"})
    assert fed(late).take_unfinished().output.text == "x" * 500


def test_items_of_a_conversation_are_read_by_each_response() -> None:
    item = event("conversation.item.create", item={"content": [{"type": "input_text", "text": "hi"}]})
    ask = event("response.create")
    reader = fed(item, ask, created("r1"), text(), done("r1"), ask, created("r2"))
    found = reader.take_unfinished()
    assert json.loads(found.prompt) == {"input": [json.loads(item)]}
    assert found.output.text == ""
    brief = event("response.create", response={"instructions": "be brief"})
    found = fed(item, brief).take_unfinished()
    assert json.loads(found.prompt) == {"input": [json.loads(item), json.loads(brief)]}


@pytest.mark.parametrize(
    ("messages", "is_speech"),
    [
        ([created(), audio()], True),
        ([CREATE, created(), audio()], True),
        ([created(), audio(), event("response.output_audio_transcript.delta", delta="hello")], False),
        ([created(), text()], False),
        ([created()], False),
        ([created(), audio(), done(), created("r2")], False),
    ],
)
def test_audio_without_a_transcript_is_speech(messages: list[str | bytes], is_speech: bool) -> None:
    reader = fed(*messages)
    assert reader.take_unfinished().is_speech is is_speech
    assert not reader.take_unfinished().is_speech


def test_an_end_without_usage_is_untold_only_where_something_was_written() -> None:
    assert not fed(CREATE, created(), done(usage=None)).is_untold
    reader = fed(CREATE, created(), text(), done(usage=None))
    assert reader.is_untold
    assert reader.take_unfinished().output.text == "hello"
    assert not reader.is_untold


def test_long_requests_and_answers_are_kept_in_part() -> None:
    reader = RealtimeReader()
    for _ in range(50):
        reader.feed_up(event("conversation.item.create", item={"text": "say " * 1000}))
        reader.feed_up(event("response.create", instructions="do " * 1000))
    for _ in range(1000):
        reader.feed(text("word " * 20))
    found = reader.take_unfinished()
    assert len(found.prompt) <= 65 << 10
    assert found.kept_bytes <= 64 << 10
    assert found.seen_bytes > 50 * 7000
    assert found.output.kept_bytes <= 16 << 10
    assert found.output.seen_bytes > 100_000


def test_data_in_a_request_is_no_text() -> None:
    url = "data:image/png;base64," + "iVBORw0KGgo" * 10_000
    ask = json.dumps({"type": "response.create", "input": [{"type": "input_image", "image_url": url}]})
    found = fed(ask).take_unfinished()
    assert len(found.prompt) < 200
    assert found.seen_bytes == found.kept_bytes


@given(st.lists(st.sampled_from([CREATE, created(), created("r2"), text(), audio(), done(), event("error")])))
def test_nothing_is_left_behind_all_ends(messages: list[str]) -> None:
    reader = fed(*messages)
    for number in range(2 * len(messages) + 1):
        reader.feed(done(f"end_{number}"))
    assert not reader.unfinished.is_asked_for
    assert reader.take_unfinished().output.text == ""


@given(st.text() | st.binary())
def test_garbage_is_no_exception(message: str | bytes) -> None:
    reader = RealtimeReader()
    reader.feed_up(message)
    reader.feed(message)
    reader.take_unfinished()
