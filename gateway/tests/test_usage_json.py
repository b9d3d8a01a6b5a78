"""Usage in JSON answers of any size, cut anywhere."""

from __future__ import annotations

import json
import random
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
    CHAT_USAGE,
    EDITS,
    EMBEDDINGS,
    IMAGES,
    JSON,
    RESPONSE,
    RESPONSE_READ,
    SPEECH,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    dumps,
    read,
    reader,
    short_id,
)
from gateway.usage import Reading, reader_for
from gateway.usage.shapes import usage_in


@pytest.mark.parametrize("cut_every", [1, 13, 1 << 20])
def test_a_json_answer_tells_usage_model_and_tier(cut_every: int) -> None:
    reading = read(CHAT, dumps(CHAT_REPLY), cut_every=cut_every)
    assert reading == Reading(CHAT_READ, "gpt-4o-2024-08-06", "default", is_complete=True)


def test_facts_survive_strange_neighbours() -> None:
    reading = read(CHAT, dumps(CHAT_REPLY | {"id": 7, "model": ["x"], "service_tier": None, "data": 1}))
    assert reading == Reading(CHAT_READ, is_complete=True)


@pytest.mark.parametrize(
    ("model", "recorded"),
    [("x" * 200, "x" * 100), ("a\nb\x00c\u202e", "abc"), ("通义千问", "通义千问"), ("", ""), ("\u2028", "")],
)
def test_a_model_is_bounded_and_printable(model: str, recorded: str) -> None:
    assert read(CHAT, dumps(CHAT_REPLY | {"model": model})).model == recorded


def test_half_a_surrogate_pair_is_no_model() -> None:
    assert read(CHAT, dumps(CHAT_REPLY | {"model": "a\ud800"})).model.isascii()


@pytest.mark.parametrize("damage", [b'"x":NaN,', b'"x":"\\ud800",', b'"x":' + b"[" * 100_000 + b"]" * 100_000 + b","])
def test_usage_is_read_where_a_parser_gives_up(damage: bytes) -> None:
    body = b"{" + damage + dumps(CHAT_REPLY)[1:]
    reading = read(CHAT, b"\xef\xbb\xbf" + body)
    assert (reading.usage, reading.model, reading.is_complete) == (CHAT_READ, "gpt-4o-2024-08-06", True)
    assert read(CHAT, b"\xef\xbb\xbf" + dumps(CHAT_REPLY)).usage == CHAT_READ


def test_the_last_of_two_usages_wins() -> None:
    first = b'{"usage":{"prompt_tokens":1,"completion_tokens":1},'
    assert read(CHAT, first + dumps(CHAT_REPLY)[1:]).usage == CHAT_READ
    assert read(CHAT, first + b'"x":NaN,' + dumps(CHAT_REPLY)[1:]).usage == CHAT_READ
    assert read(CHAT, first + b'"x":"' + b"x" * 300_000 + b'",' + dumps(CHAT_REPLY)[1:]).usage == CHAT_READ


def test_a_cut_answer_tells_the_truth_or_nothing() -> None:
    body = dumps(CHAT_REPLY)
    for end in range(len(body)):
        reading = read(CHAT, body[:end], is_whole=False)
        assert reading.usage in (None, CHAT_READ)
        assert not reading.is_complete
    assert read(CHAT, body[: body.index(b'"usage":{"prompt_tokens":2') + 20]).usage is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"usage":null}',
        b'{"choices":[{"usage":{"prompt_tokens":1,"completion_tokens":1}}]}',
        b'[{"usage":{"prompt_tokens":1,"completion_tokens":1}}]',
        b'{"x":"\\"usage\\":{\\"prompt_tokens\\":1,\\"completion_tokens\\":1}"}',
        b"\x00\xff" * 1000,
        b"[" * 100_000,
        b'{"usage":' * 50_000,
        b'"' * 100_000,
        b"\\" * 100_000,
        b'{"a":"' + b'\\"' * 100_000,
        b'{"error":{"message":"x"}}',
    ],
    ids=short_id,
)
def test_no_usage_is_none_and_never_an_exception(body: bytes) -> None:
    assert read(CHAT, body).usage is None
    assert read(CHAT, body * 400 if len(body) > 1000 else body).usage is None


def test_a_large_answer_of_embeddings_is_read_from_its_end() -> None:
    vectors = [
        {"object": "embedding", "index": i, "embedding": [random.random() for _ in range(1536)]} for i in range(40)
    ]
    reply = {"object": "list", "data": vectors, "model": "text-embedding-3-small"}
    body = json.dumps(reply | {"usage": {"prompt_tokens": 8, "total_tokens": 8}}, indent=2).encode()
    assert len(body) > 1 << 20
    for cut_every in (1000, 1 << 16, 1 << 30):
        reading = read(EMBEDDINGS, body, cut_every=cut_every)
        assert reading == Reading(Usage(input_tokens=8), "text-embedding-3-small", is_complete=True)


DECOYS = st.recursive(
    st.none() | st.integers() | st.text(max_size=10) | st.sampled_from(['"usage":{"prompt_tokens":3}', "\\", '\\"']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["usage", "model", "x", '"usage"', "\\"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(DECOYS, DECOYS, DECOYS, st.sampled_from([b"", b'"big":[1.5],']), st.integers(1, 5000), st.booleans())
def test_only_the_outermost_usage_counts_in_a_large_answer(
    first: Any, second: Any, third: Any, middle: bytes, cut_every: int, spaced: bool
) -> None:
    big = b'"big":"' + b'\\"' * 140_000 + b'",'
    members = {"first": first, "usage": CHAT_USAGE, "third": third}
    text = json.dumps(members, indent=1 if spaced else None).encode()
    body = b'{"model":"m","second":' + dumps(second) + b"," + big + middle + text[1:]
    reading = reader(CHAT)
    reading.feed(body[:200_000])
    for at in range(200_000, len(body), cut_every):
        reading.feed(body[at : at + cut_every])
    result = reading.result()
    assert result.usage == CHAT_READ
    assert result.is_complete


@pytest.mark.parametrize("cut_every", [1, 4, 1000, 1 << 16, 1 << 30])
def test_usage_in_the_middle_of_a_large_answer_is_read(cut_every: int) -> None:
    text = json.dumps({"choices": [{"message": {"content": 'Say "usage": {"prompt_tokens": 7}} ' * 20_000}}]}).encode()
    behind = b',"usage":' + dumps(CHAT_USAGE) + b',"prompt_logprobs":[' + b"1.25," * 40_000 + b"0]}"
    reading = reader(CHAT)
    body = b'{"model":"m",' + text[1:-1] + behind
    at = len(body) - len(behind) - 50
    reading.feed(body[:at])
    for start in range(at, at + 500, min(cut_every, 500)):
        reading.feed(body[start : min(start + cut_every, at + 500)])
    reading.feed(body[at + 500 :])
    assert reading.result() == Reading(CHAT_READ, "m", is_complete=True)


def test_a_large_answer_that_is_cut_takes_no_inner_usage_for_its_own() -> None:
    inner = {"x": "y" * 300_000, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    body = b'{"choices":[{"message":' + dumps(inner)
    assert read(CHAT, body, is_whole=False) == Reading()


def test_usage_at_the_head_of_a_large_answer_is_read_even_of_a_cut_one() -> None:
    body = b'{"model":"m","usage":' + dumps(CHAT_USAGE) + b',"x":"' + b"x" * 400_000
    assert read(CHAT, body, is_whole=False) == Reading(CHAT_READ, "m")


@pytest.mark.parametrize("cut_every", [3, 1000, 1 << 16])
@pytest.mark.parametrize("size", [10, 200_000])
def test_images_are_counted_whatever_their_size(cut_every: int, size: int) -> None:
    data = [{"b64_json": "A" * size, "revised_prompt": 'an "url" and a "b64_json"'} for _ in range(3)]
    usage = {"input_tokens": 50, "output_tokens": 4000, "input_tokens_details": {"text_tokens": 50}}
    reading = read(IMAGES, dumps({"created": 1, "data": data, "usage": usage}), cut_every=cut_every)
    assert reading.usage == Usage(input_tokens=50, image_output_tokens=4000, images=3)
    without = read(EDITS, dumps({"created": 1, "data": [{"url": "https://x"}, {"url": "y"}]}), cut_every=cut_every)
    assert without.usage == Usage(images=2)


def test_an_answer_of_a_stored_object_is_no_usage_of_this_request() -> None:
    for path in (b"/v1/responses/resp_67", b"/v1/batches/batch_1"):
        stored = reader(path, method="GET")
        stored.feed(dumps(RESPONSE))
        result = stored.result()
        assert (result.usage, result.stored_usage, result.object_id) == (None, RESPONSE_READ, "resp_67")
    assert reader_for(endpoint_of("GET", b"/v1/batches"), JSON) is None


def test_a_verbose_transcription_tells_its_seconds() -> None:
    reply = {"task": "transcribe", "duration": 8.47, "text": "x"}
    assert read(TRANSCRIPTIONS, dumps(reply)).usage == Usage(seconds=8.47)
    assert read(TRANSLATIONS, dumps(reply | {"duration": "8.5"})).usage == Usage(seconds=8.5)
    with_usage = reply | {"usage": {"type": "duration", "seconds": 9}}
    assert read(TRANSCRIPTIONS, dumps(with_usage)).usage == Usage(seconds=9)
    for duration in (-1, "x", None, [1], 1e300):
        assert read(TRANSCRIPTIONS, dumps(reply | {"duration": duration})).usage is None


def test_which_answers_are_read() -> None:
    assert reader_for(endpoint_of("POST", SPEECH), b"audio/mpeg") is None
    assert reader_for(endpoint_of("GET", b"/v1/models"), JSON) is None
    assert reader_for(endpoint_of("GET", b"/v1/realtime"), JSON) is None
    assert reader_for(endpoint_of("POST", b"/v1/unheard/of"), b"") is not None
    assert read(b"/v1/moderations", b'{"id":"modr-1","model":"omni-moderation-latest"}').usage is None


@pytest.mark.parametrize("details", [b"[]", b"{}", b"null"])
def test_details_that_are_none_spoil_no_totals(details: bytes) -> None:
    report = b'{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8,"prompt_tokens_details":%b}' % details
    assert usage_in(report, Meter.CHAT) == Usage(input_tokens=5, output_tokens=3)
