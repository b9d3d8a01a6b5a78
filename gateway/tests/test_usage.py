from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.events import Usage
from billing.pricing import MAX_QUANTITY
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
    RESPONSE_USAGE,
    SPEECH,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    dumps,
    read,
    reader,
    short_id,
)
from gateway.usage import Reading, reader_for
from gateway.usage.shapes import _plain_usage, _reported_in, _usage, usage_in

# What each route reports

DETAILS = ["cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens", "text_tokens", "reasoning_tokens"]
OTHERS = [
    "input_tokens",
    "seconds",
    "prompt_cache_hit_tokens",
    "cached_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
]
SMALL = st.none() | st.integers(-1, 12) | st.sampled_from([1.0, 2.5, True, 1 << 54])


@given(
    given_tokens=SMALL,
    made=SMALL,
    total=SMALL,
    read=st.none() | st.fixed_dictionaries({}, optional={name: SMALL for name in DETAILS}),
    written=st.none() | st.fixed_dictionaries({}, optional={name: SMALL for name in DETAILS}),
    more=st.fixed_dictionaries({}, optional={name: SMALL for name in OTHERS}),
    meter=st.sampled_from([Meter.CHAT, Meter.COMPLETIONS]),
)
def test_a_plain_report_is_read_as_any_other(
    given_tokens: Any, made: Any, total: Any, read: Any, written: Any, more: Any, meter: Meter
) -> None:
    total = given_tokens + made if total is None and None not in (given_tokens, made) else total
    reported = {
        "prompt_tokens": given_tokens,
        "completion_tokens": made,
        "total_tokens": total,
        "prompt_tokens_details": read,
        "completion_tokens_details": written,
    }
    report = json.dumps({name: value for name, value in reported.items() if value is not None} | more).encode()
    plain = _plain_usage(report)
    assert plain is None or plain == _usage(_reported_in(report), meter)


def test_what_openai_reports_of_text_is_plain() -> None:
    assert _plain_usage(msgspec.json.encode(CHAT_USAGE)) == CHAT_READ


@pytest.mark.parametrize(
    ("meter", "reported", "usage"),
    [
        (Meter.CHAT, CHAT_USAGE, CHAT_READ),
        (Meter.CHAT, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, Usage()),
        (Meter.CHAT, {"prompt_tokens": 9, "completion_tokens": 12}, Usage(input_tokens=9, output_tokens=12)),
        (
            Meter.CHAT,  # gpt-4o-audio
            {
                "prompt_tokens": 117,
                "completion_tokens": 50,
                "prompt_tokens_details": {"audio_tokens": 100, "text_tokens": 17, "cached_tokens": 0},
                "completion_tokens_details": {"audio_tokens": 40, "text_tokens": 10},
            },
            Usage(input_tokens=17, audio_input_tokens=100, output_tokens=10, audio_output_tokens=40),
        ),
        (
            Meter.CHAT,  # cached tokens beyond the text can only be audio
            {
                "prompt_tokens": 100,
                "completion_tokens": 1,
                "prompt_tokens_details": {"audio_tokens": 50, "cached_tokens": 60},
            },
            Usage(cached_input_tokens=50, cached_audio_input_tokens=10, audio_input_tokens=40, output_tokens=1),
        ),
        (Meter.RESPONSES, RESPONSE_USAGE, RESPONSE_READ),
        (Meter.EMBEDDINGS, {"prompt_tokens": 8, "total_tokens": 8}, Usage(input_tokens=8)),
        (Meter.EMBEDDINGS, {"total_tokens": 8}, Usage(input_tokens=8)),
        (
            Meter.IMAGES,
            {
                "total_tokens": 100,
                "input_tokens": 50,
                "output_tokens": 50,
                "input_tokens_details": {"text_tokens": 10, "image_tokens": 40},
            },
            Usage(input_tokens=10, image_input_tokens=40, image_output_tokens=50),
        ),
        (
            Meter.IMAGES,
            {
                "input_tokens": 50,
                "output_tokens": 50,
                "input_tokens_details": {"text_tokens": 10, "image_tokens": 40},
                "output_tokens_details": {"text_tokens": 8, "image_tokens": 42},
            },
            Usage(input_tokens=10, image_input_tokens=40, output_tokens=8, image_output_tokens=42),
        ),
        (
            Meter.TRANSCRIPTION,
            {
                "type": "tokens",
                "input_tokens": 14,
                "input_token_details": {"text_tokens": 4, "audio_tokens": 10},
                "output_tokens": 45,
                "total_tokens": 59,
            },
            Usage(input_tokens=4, audio_input_tokens=10, output_tokens=45),
        ),
        (Meter.TRANSCRIPTION, {"type": "duration", "seconds": 9}, Usage(seconds=9.0)),
        (
            Meter.SPEECH,
            {"input_tokens": 14, "output_tokens": 101, "total_tokens": 115},
            Usage(input_tokens=14, audio_output_tokens=101),
        ),
        (
            Meter.REALTIME,
            {
                "total_tokens": 253,
                "input_tokens": 132,
                "output_tokens": 121,
                "input_token_details": {
                    "text_tokens": 100,
                    "audio_tokens": 20,
                    "image_tokens": 12,
                    "cached_tokens": 76,
                    "cached_tokens_details": {"text_tokens": 64, "audio_tokens": 8, "image_tokens": 4},
                },
                "output_token_details": {"text_tokens": 30, "audio_tokens": 91},
            },
            Usage(
                input_tokens=36,
                cached_input_tokens=64,
                audio_input_tokens=12,
                cached_audio_input_tokens=8,
                image_input_tokens=8,
                cached_image_input_tokens=4,
                output_tokens=30,
                audio_output_tokens=91,
            ),
        ),
        # Other upstreams: DeepSeek, Moonshot, Anthropic, xAI, and one that counts in floats.
        (
            Meter.CHAT,
            {"prompt_tokens": 9, "completion_tokens": 1, "prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 5},
            Usage(input_tokens=5, cached_input_tokens=4, output_tokens=1),
        ),
        (
            Meter.CHAT,
            {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 9},
            Usage(cached_input_tokens=9, output_tokens=1),
        ),
        (
            Meter.OTHER,
            {
                "input_tokens": 5,
                "cache_creation_input_tokens": 30,
                "cache_read_input_tokens": 200,
                "output_tokens": 7,
            },
            Usage(input_tokens=5, cached_input_tokens=200, cache_write_tokens=30, output_tokens=7),
        ),
        (
            Meter.CHAT,
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 115,
                "completion_tokens_details": {"reasoning_tokens": 100},
            },
            Usage(input_tokens=10, output_tokens=105, reasoning_tokens=100),
        ),
        (Meter.CHAT, {"prompt_tokens": 9.0, "completion_tokens": 2e1}, Usage(input_tokens=9, output_tokens=20)),
        # Details that contradict their total are cut down to it.
        (
            Meter.CHAT,
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 99, "audio_tokens": 99, "cache_write_tokens": 99},
                "completion_tokens_details": {"reasoning_tokens": 99, "audio_tokens": 3},
            },
            Usage(cached_audio_input_tokens=10, output_tokens=2, reasoning_tokens=2, audio_output_tokens=3),
        ),
    ],
    ids=short_id,
)
def test_a_report_is_split_into_disjoint_buckets(meter: Meter, reported: dict[str, Any], usage: Usage) -> None:
    assert usage_in(dumps(reported), meter) == usage


@pytest.mark.parametrize(
    "reported",
    [
        b"",
        b"null",
        b"{}",
        b"[]",
        b"7",
        b'"prompt_tokens"',
        b'{"x":1}',
        b'{"completion_tokens":5}',
        b'{"output_tokens":5,"total_tokens":9}',
        b'{"prompt_tokens":null,"completion_tokens":null}',
        b'{"prompt_tokens":-1,"completion_tokens":1}',
        b'{"prompt_tokens":1,"completion_tokens":-1}',
        b'{"prompt_tokens":1.5,"completion_tokens":1}',
        b'{"prompt_tokens":"1","completion_tokens":1}',
        b'{"prompt_tokens":true,"completion_tokens":1}',
        b'{"prompt_tokens":[1],"completion_tokens":1}',
        b'{"prompt_tokens":NaN,"completion_tokens":1}',
        b'{"prompt_tokens":1e400,"completion_tokens":1}',
        b'{"prompt_tokens":9007199254740993,"completion_tokens":1}',
        b'{"prompt_tokens":' + b"9" * 5000 + b',"completion_tokens":1}',
        b'{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":-1}}',
        b'{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":"1"}}',
        b'{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":[1]}',
        b'{"seconds":-1}',
        b'{"seconds":1e300}',
        b'{"prompt_tokens":1,"completion_tokens":1',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"prompt_tokens":1,"completion_tokens":1}',
    ],
    ids=short_id,
)
def test_what_is_no_report_counts_as_none(reported: bytes) -> None:
    assert usage_in(reported, Meter.CHAT) is None


# Negative, broken, of another type, or more than any request can hold.
NONSENSE = [b"-1", b"-1e18", b"0.5", b'"7"', b"true", b"[7]", b"{}", b"NaN", b"Infinity", b"-Infinity", b"1e400"]
NONSENSE += [b"%d" % (MAX_QUANTITY + 1), b"9007199254740992", b"9" * 30, b"9" * 5000]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=short_id)
@pytest.mark.parametrize(
    "report",
    [
        b'{"prompt_tokens":%b,"completion_tokens":1,"total_tokens":2}',
        b'{"prompt_tokens":1,"completion_tokens":%b,"total_tokens":2}',
        b'{"input_tokens":%b,"output_tokens":1}',
        b'{"input_tokens":1,"output_tokens":%b}',
        b'{"total_tokens":%b}',
        b'{"prompt_tokens":2,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":%b}}',
        b'{"input_tokens":2,"output_tokens":1,"input_tokens_details":{"cached_tokens":1,"audio_tokens":%b}}',
        b'{"input_tokens":2,"output_tokens":1,"output_tokens_details":{"reasoning_tokens":%b}}',
        b'{"input_tokens":2,"output_tokens":1,"cache_read_input_tokens":%b}',
        b'{"input_tokens":2,"output_tokens":1,"cache_creation_input_tokens":%b}',
    ],
    ids=short_id,
)
def test_a_report_with_a_count_that_cannot_be_is_none_or_does_without_it(report: bytes, nonsense: bytes) -> None:
    for meter in Meter:
        usage = usage_in(report % nonsense, meter)
        assert usage is None or sum(msgspec.structs.astuple(usage)) <= 4


def test_counts_that_are_too_large_only_together_are_no_report() -> None:
    most = {"input_tokens": MAX_QUANTITY, "output_tokens": MAX_QUANTITY}
    assert usage_in(dumps(most), Meter.CHAT) == Usage(input_tokens=MAX_QUANTITY, output_tokens=MAX_QUANTITY)
    assert usage_in(dumps(most | {"cache_read_input_tokens": 1}), Meter.CHAT) is None
    thought = {"output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 2 * MAX_QUANTITY + 1}
    assert usage_in(dumps(most | thought), Meter.CHAT) is None


TOKENS = st.integers(0, 1000) | st.integers(0, MAX_QUANTITY // 2)
DETAILS = st.fixed_dictionaries(
    {},
    optional={
        "cached_tokens": TOKENS,
        "cache_write_tokens": TOKENS,
        "audio_tokens": TOKENS,
        "image_tokens": TOKENS,
        "text_tokens": TOKENS,
        "reasoning_tokens": TOKENS,
        "cached_tokens_details": st.fixed_dictionaries({}, optional={"audio_tokens": TOKENS, "image_tokens": TOKENS}),
    },
)
INPUT_BUCKETS = (
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "audio_input_tokens",
    "cached_audio_input_tokens",
    "image_input_tokens",
    "cached_image_input_tokens",
)
OUTPUT_BUCKETS = ("output_tokens", "audio_output_tokens", "image_output_tokens")


@settings(deadline=None)
@given(st.sampled_from(Meter), TOKENS, TOKENS, DETAILS, DETAILS, st.sampled_from([0, 1, 2]))
def test_the_buckets_sum_to_the_totals_that_were_reported(
    meter: Meter, total_in: int, total_out: int, details_in: dict[str, Any], details_out: dict[str, Any], shape: int
) -> None:
    into = ("prompt_tokens", "input_tokens", "input_tokens")[shape]
    out = ("completion_tokens", "output_tokens", "output_tokens")[shape]
    details = "_token_details" if shape == 2 else "_tokens_details"
    names = [name.removesuffix("_tokens") + details for name in (into, out)]
    reported = {into: total_in, out: total_out, names[0]: details_in, names[1]: details_out}
    usage = usage_in(dumps(reported | {"total_tokens": total_in + total_out}), meter)
    assert usage is not None
    buckets = msgspec.structs.asdict(usage)
    assert min(buckets.values()) >= 0
    assert sum(buckets[name] for name in INPUT_BUCKETS) == total_in
    assert sum(buckets[name] for name in OUTPUT_BUCKETS) == total_out
    assert usage.reasoning_tokens <= usage.output_tokens
    cached = sum(buckets[name] for name in INPUT_BUCKETS if name.startswith("cached"))
    assert cached == min(details_in.get("cached_tokens", 0), total_in)


# JSON answers


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
