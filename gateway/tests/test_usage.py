from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.events import Usage
from billing.pricing import MAX_QUANTITY
from gateway.endpoints import Meter
from gateway.tests.usage_answers import (
    CHAT_READ,
    CHAT_USAGE,
    RESPONSE_READ,
    RESPONSE_USAGE,
    dumps,
    short_id,
)
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
