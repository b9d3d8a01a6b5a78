"""Answers as OpenAI gives them, and what their usage is."""

from __future__ import annotations

import json
from typing import Any

from billing.events import Usage
from gateway.endpoints import endpoint_of
from gateway.usage import Reading, UsageReader, reader_for

JSON, SSE = b"application/json", b"text/event-stream; charset=utf-8"
CHAT, COMPLETIONS = b"/v1/chat/completions", b"/v1/completions"
RESPONSES, EMBEDDINGS = b"/v1/responses", b"/v1/embeddings"
IMAGES, EDITS = b"/v1/images/generations", b"/v1/images/edits"
TRANSCRIPTIONS, TRANSLATIONS, SPEECH = b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/audio/speech"

CHAT_USAGE = {
    "prompt_tokens": 2006,
    "completion_tokens": 300,
    "total_tokens": 2306,
    "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 256,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}
CHAT_READ = Usage(input_tokens=86, cached_input_tokens=1920, output_tokens=300, reasoning_tokens=256)
CHAT_REPLY = {
    "id": "chatcmpl-B9",
    "object": "chat.completion",
    "created": 1741569952,
    "model": "gpt-4o-2024-08-06",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": 'Say "usage": {"prompt_tokens": 7}} \\', "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": CHAT_USAGE,
    "service_tier": "default",
    "system_fingerprint": "fp_fc9f1d7035",
}
RESPONSE_USAGE = {
    "input_tokens": 328,
    "input_tokens_details": {"cached_tokens": 300, "cache_write_tokens": 8},
    "output_tokens": 52,
    "output_tokens_details": {"reasoning_tokens": 12},
    "total_tokens": 380,
}
RESPONSE_READ = Usage(
    input_tokens=20, cached_input_tokens=300, cache_write_tokens=8, output_tokens=52, reasoning_tokens=12
)
RESPONSE = {
    "id": "resp_67",
    "object": "response",
    "status": "completed",
    "instructions": 'Never say "usage".',
    "model": "gpt-5-2025-08-07",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "Hi, {you}!"}]}],
    "service_tier": "priority",
    "text": {"format": {"type": "text"}},
    "usage": RESPONSE_USAGE,
    "user": None,
    "metadata": {"usage": "mine"},
}


def reader(path: bytes, content_type: bytes = JSON, method: str = "POST") -> UsageReader:
    made = reader_for(endpoint_of(method, path), content_type)
    assert made is not None
    return made


def read(path: bytes, body: bytes, content_type: bytes = JSON, *, cut_every: int = 1 << 30, **kwargs: bool) -> Reading:
    reading = reader(path, content_type)
    for at in range(0, len(body), cut_every):
        reading.feed(body[at : at + cut_every])
    return reading.result(**kwargs)


def dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def events(*values: object, end: str = "\n", named: bool = False) -> bytes:
    out = []
    for value in values:
        name = f"event: {value['type']}{end}" if named and isinstance(value, dict) else ""
        data = value if isinstance(value, str) else json.dumps(value)
        out.append(f"{name}data: {data}{end}{end}")
    return "".join(out).encode()


def chunk(text: str, **members: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    head = {"id": "chatcmpl-B9", "object": "chat.completion.chunk", "model": "gpt-4o-2024-08-06"}
    return head | {"service_tier": "default", "choices": choices} | members


CHAT_STREAM = events(
    *(chunk(text, usage=None) for text in ("Hel", 'lo "usage": {', "好😀", "[DONE]")),
    chunk("", choices=[], usage=CHAT_USAGE),
    "[DONE]",
)
RESPONSE_STREAM = events(
    {"type": "response.created", "response": RESPONSE | {"output": [], "usage": None, "service_tier": "auto"}},
    {"type": "response.output_text.delta", "delta": "Hi, "},
    {"type": "response.output_text.delta", "delta": "{you}!"},
    {"type": "response.output_text.done", "text": "Hi, {you}!"},
    {"type": "response.completed", "response": RESPONSE, "sequence_number": 9},
    named=True,
)


def short_id(value: object) -> str:
    return repr(value)[:40]
