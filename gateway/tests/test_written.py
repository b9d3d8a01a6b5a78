"""How many tokens an event stream has brought, however its upstream cuts it into events."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from typing import Any

import pytest

from gateway.estimator_process import counter
from gateway.written import tokens_in_events


def events(*said: Any, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return b"".join(f"{head}data: {json.dumps(one)}\n\n".encode() for one in said)


def chat(delta: Any, **more: Any) -> bytes:
    return events({"id": "c", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta} | more]})


def test_tokens_of_a_stream_are_counted_by_events_and_by_text() -> None:
    one = b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n'
    assert tokens_in_events(one * 5) == 5
    many = b'data: {"choices":[{"delta":{"content":"' + b"word " * 300 + b'"}}]}\n\n'
    assert tokens_in_events(many) == 300
    numbers = b'data: {"choices":[{"delta":{"content":"word 1234 "}}]}\n\n'
    assert tokens_in_events(numbers) == 4  # word, a blank, 123, 4
    assert tokens_in_events('data: {"choices":[{"delta":{"content":"你好世界"}}]}\n\n'.encode()) == 4


LETTERS = "qzjxkvbwpyfgmculdrhsnioate" * 20
WRITTEN = [
    (LETTERS, 0.8, 1.2),
    (LETTERS.upper(), 0.7, 1.2),
    (b64encode(random.Random(1).randbytes(900)).decode(), 0.7, 1.2),
    ("Donaudampfschifffahrtsgesellschaftskapitän " * 20, 1, 2),
    ("The quick brown fox jumps over the lazy dog; Authorization is required.\n" * 20, 1, 1.5),
    ("今天天气很好，我们去公园散步吧。" * 20, 1, 2),
    ("Привет, как дела сегодня? " * 20, 1, 2.5),
    ("😀🎉" * 50, 1, 1.5),
]


@pytest.mark.parametrize("is_escaped", [False, True])
@pytest.mark.parametrize(("text", "least", "most"), WRITTEN, ids=lambda value: str(value)[:8])
def test_what_is_packed_into_events_counts_about_as_a_tokenizer_would(
    text: str, least: float, most: float, *, is_escaped: bool
) -> None:
    pieces = (text[start : start + 50] for start in range(0, len(text), 50))
    said = ({"choices": [{"delta": {"content": piece}}]} for piece in pieces)
    stream = b"".join(b"data: " + json.dumps(one, ensure_ascii=is_escaped).encode() + b"\n\n" for one in said)
    tokens = counter("o200k_base")(text)
    assert least * tokens <= tokens_in_events(stream) <= most * tokens


SILENT = [
    chat({"role": "assistant", "content": ""}),
    chat({"role": "assistant", "content": None, "refusal": None}),
    chat({}, finish_reason="stop"),
    events({"choices": [], "usage": {"completion_tokens": 7}}),
    events({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}),
    b"data: [DONE]\n\n",
    b"event: done\ndata: [DONE]\n\n",
    b": keep-alive\n\n",
    events({"type": "response.created", "response": {"id": "r"}}),
    events({"type": "response.output_text.done", "text": "word " * 100}, name="response.output_text.done"),
    events({"type": "response.content_part.done", "part": {"text": "word " * 100}}),
    events({"type": "response.completed", "response": {"output": [{"content": [{"text": "word " * 100}]}]}}),
    events(
        {"object": "thread.message", "content": [{"text": {"value": "word " * 9}}]}, name="thread.message.completed"
    ),
]


@pytest.mark.parametrize("said", SILENT, ids=lambda said: said[:60].decode())
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_what_brings_nothing_new_is_no_token(said: bytes, end: bytes) -> None:
    assert tokens_in_events(said.replace(b"\n", end)) == 0


SAYING = [
    (chat({"content": " word"}), 1),
    (chat({"role": "assistant", "content": " word"}), 1),
    (chat({"content": "  "}), 1),
    (chat({"thoughts_of_some_maker": "hm"}), 1),
    (chat({"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]}), 3),
    (events({"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]}), 2),
    (events({"choices": [{"index": 0, "text": " two words"}]}), 2),
    (events({"type": "response.output_text.delta", "delta": " word"}, name="response.output_text.delta"), 1),
    (events({"type": "response.reasoning_summary_text.delta", "delta": " two words"}), 2),
    (events({"delta": {"content": [{"text": {"value": "two words"}}]}}, name="thread.message.delta"), 2),
    (events({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "two words"}}), 2),
    (events({"message": {"content": "two words"}}), 2),
    (b'data: {"choices": [{"delta": {"content": "two words, cut', 4),
    (b'data: {"choices":\ndata: [{"delta": {"content": "two words"}}]}\n\n', 2),
]


@pytest.mark.parametrize(("said", "tokens"), SAYING, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_whatever_is_said_is_a_token_at_least(said: bytes, tokens: int, end: bytes) -> None:
    assert tokens_in_events(said.replace(b"\n", end)) == tokens
    assert tokens_in_events((said + b"\n\n").replace(b"\n", end) * 3) == 3 * tokens
