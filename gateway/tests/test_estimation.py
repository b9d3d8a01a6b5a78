"""Estimates: counted by a real process beside this one, and guessed where there is none."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.estimation import Estimator, guessed_tokens
from gateway.estimator_process import IMAGE_TOKENS, Counts, Job, counts_of, encoding_name, extrapolated
from gateway.tests.estimates import SENTENCE, chat_body, input_tokens, json_body, library, output_tokens, own_counter
from gateway.usage.sample import OutputSample

TEXTS = [
    "hello world",
    "tiktoken is great!",
    SENTENCE * 50,
    "今天天气很好，我们去公园玩吧。",
    "😀👍🏽👩‍👩‍👧‍👦🇨🇳",
    "Привет, как дела? Γειά σου. مرحبا",
    "def f(x):\n\treturn {'a': [1, 22, 333, 4444]}\r\n",
    "<|endoftext|> is text here",
    "".join(map(chr, range(256))),
    "a" * 5000,
    " \n" * 3000,
]


# What is counted


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
@pytest.mark.parametrize("text", TEXTS)
async def test_an_output_has_the_tokens_that_the_library_counts(patient: Estimator, text: str, model: str) -> None:
    assert await output_tokens(patient, text, model) == library(encoding_name(model))(text)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
async def test_a_text_has_the_tokens_that_openai_publishes(patient: Estimator, model: str) -> None:
    assert await output_tokens(patient, "tiktoken is great!", model) == 6


async def test_half_a_surrogate_pair_is_counted_as_something(patient: Estimator) -> None:
    assert await output_tokens(patient, "a\ud83d b \udc00") == library("o200k_base")("a? b ?")


async def test_a_short_chat_has_the_tokens_that_openai_reports(patient: Estimator) -> None:
    assert await input_tokens(patient, Meter.CHAT, chat_body("hi")) == 8


async def test_each_message_costs_as_the_cookbook_says(patient: Estimator) -> None:
    one = await input_tokens(patient, Meter.CHAT, chat_body("hi"))

    # 3 for the message, 1 for its role, 1 for its text
    assert await input_tokens(patient, Meter.CHAT, chat_body("hi", "hi", "hi")) == one + 2 * 5


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("meter", [Meter.COMPLETIONS, Meter.EMBEDDINGS])
async def test_a_prompt_that_is_no_chat_costs_its_text(patient: Estimator, meter: Meter, text: str) -> None:
    name = "input" if meter is Meter.EMBEDDINGS else "prompt"

    assert await input_tokens(patient, meter, json_body(**{name: text})) == library("o200k_base")(text)


async def test_a_prompt_of_tokens_is_as_long_as_it_is(patient: Estimator) -> None:
    assert await input_tokens(patient, Meter.EMBEDDINGS, json_body(input=[[5, 6, 7], [8]])) == 4


async def test_an_embedding_has_no_output(patient: Estimator) -> None:
    usage = await patient.estimate(
        meter=Meter.EMBEDDINGS,
        model="text-embedding-3-small",
        request_body=json_body(input="hello world"),
        output=OutputSample("hello world", 10, 10),
    )

    assert usage == Usage(input_tokens=2)


async def test_an_image_costs_the_same_whatever_its_size(patient: Estimator) -> None:
    url = "data:image/png;base64," + base64.b64encode(os.urandom(300_000)).decode()
    image = {"type": "image_url", "image_url": {"url": url}}

    tokens = await input_tokens(patient, Meter.CHAT, chat_body([{"type": "text", "text": "hi"}, image]))

    assert tokens == 8 + IMAGE_TOKENS


async def test_an_output_kept_in_part_is_extrapolated(patient: Estimator) -> None:
    output = OutputSample("hello world", seen_bytes=5000, kept_bytes=1000)

    usage = await patient.estimate(meter=Meter.RESPONSES, model="gpt-5", request_body=None, output=output)

    assert usage == Usage(output_tokens=10)


@pytest.mark.parametrize(
    ("tokens", "seen", "kept", "expected"), [(7, 0, 0, 7), (7, 10, 10, 7), (7, 5, 10, 7), (7, 15, 10, 10)]
)
def test_a_part_stands_for_the_whole(tokens: int, seen: int, kept: int, expected: int) -> None:
    assert extrapolated(tokens, seen=seen, kept=kept) == expected


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("", "o200k_base"),
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("o3", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("deepseek-chat", "o200k_base"),
        ("ft:gpt-4o:acme::1", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("GPT-4-turbo-2024-04-09", "cl100k_base"),
        ("gpt-4-32k", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("gpt-35-turbo", "cl100k_base"),
        ("openai/gpt-4", "cl100k_base"),
        ("ft:gpt-3.5-turbo-0125:acme::1", "cl100k_base"),
        ("text-embedding-3-large", "cl100k_base"),
    ],
)
def test_a_model_has_its_encoding(model: str, encoding: str) -> None:
    assert encoding_name(model) == encoding


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00\x80" * 50, b"[" * 100_000, b'{"messages":7}']
)
@pytest.mark.parametrize("meter", list(Meter))
async def test_a_body_that_is_nothing_spoils_nothing(patient: Estimator, meter: Meter, body: bytes) -> None:
    pid = patient.child_pid

    await input_tokens(patient, meter, body)

    assert await output_tokens(patient, "hello world") == 2
    assert patient.child_pid == pid


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Meter)), st.binary(max_size=500), st.binary(max_size=500))
def test_any_bytes_can_be_counted_and_guessed(meter: Meter, body: bytes, text: bytes) -> None:
    counts = counts_of(Job(meter, "o200k_base", body, text), own_counter())

    assert counts.input_tokens >= 0
    assert 0 <= counts.output_tokens <= 3 * len(text)
    assert 0 <= guessed_tokens(text) <= len(text) + 1


def test_a_job_without_a_prompt_counts_none() -> None:
    assert counts_of(Job(Meter.CHAT, "o200k_base", b"", b"hi"), own_counter()) == Counts(0, 1)


# What is guessed


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        (SENTENCE * 400, 0.25),
        ("今天天气很好，我们去公园玩吧。" * 400, 0.45),
        (json.dumps("今天天气很好，我们去公园玩吧。" * 400), None),
        (json.dumps([{"name": f"item {n}", "price": n * 1.5} for n in range(500)]), 0.45),
        (Path(__file__).read_text(), 0.3),
    ],
)
def test_a_guess_is_near_the_count(text: str, tolerance: float | None) -> None:
    """`tolerance` is None for escaped text, which stands for what it means."""
    tokens = library("o200k_base")(text if tolerance else json.loads(text))

    assert guessed_tokens(text.encode()) == pytest.approx(tokens, rel=tolerance or 0.45)


def test_a_guess_takes_base64_for_no_text() -> None:
    image = base64.b64encode(os.urandom(1 << 20))
    text = (SENTENCE * 2000).encode()

    guessed = guessed_tokens(b'{"content":"' + text + b'","url":"data:image/png;base64,' + image + b'"}')

    assert guessed == pytest.approx(guessed_tokens(text), rel=0.2)


def test_a_guess_takes_compact_lists_of_tokens_for_tokens() -> None:
    assert guessed_tokens(json.dumps(list(range(10_000, 20_000)), separators=(",", ":")).encode()) >= 10_000


@pytest.mark.parametrize(
    "data",
    [b"a b " * (64 << 10), "好".encode() * (85 << 10), b"\\u4f60" * (43 << 10)],
    ids=["words", "characters", "escapes"],
)
def test_a_guess_costs_the_loop_little(data: bytes) -> None:
    best = min(_seconds(guessed_tokens, data) for _ in range(20))

    # Half a millisecond on a machine of today's; a hundred times as much data would take a hundred times as long.
    assert best < 0.01
    assert min(_seconds(guessed_tokens, data * 100) for _ in range(20)) < 0.01


def _seconds(function: Callable[[bytes], int], data: bytes) -> float:
    """Return how long it runs, without the time in which others do."""
    started = time.thread_time()
    function(data)
    return time.thread_time() - started
