"""What an estimator, and the library that it counts with, make of a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import bpe_openai

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.estimation import Estimator
from gateway.estimator_process import counter
from gateway.usage.sample import OutputSample

NOTHING = OutputSample()
# Long enough for any machine: what these tests want to see is a count, not a guess.
PATIENT_S = 60.0
SENTENCE = "The quick brown fox jumps over the lazy dog. "


@cache
def library(encoding: str) -> Callable[[str], int]:
    """Return how many tokens the package's public interface, compatible with tiktoken, makes of a text."""
    encode = bpe_openai.get_encoding(encoding).encode_ordinary
    return lambda text: len(encode(text))


@cache
def own_counter() -> Callable[[str], int]:
    return counter("o200k_base")


def json_body(**members: Any) -> bytes:
    return json.dumps({"model": "gpt-4o", **members}, ensure_ascii=False).encode()


def chat_body(*contents: Any) -> bytes:
    return json_body(messages=[{"role": "user", "content": content} for content in contents])


async def input_tokens(estimator: Estimator, meter: Meter, body: bytes | None, model: str = "gpt-4o") -> int:
    usage = await estimator.estimate(meter=meter, model=model, request_body=body, output=NOTHING)
    assert usage == Usage(input_tokens=usage.input_tokens)
    return usage.input_tokens


async def output_tokens(estimator: Estimator, text: str, model: str = "gpt-4o") -> int:
    output = OutputSample(text, 100, 100)
    usage = await estimator.estimate(meter=Meter.CHAT, model=model, request_body=None, output=output)
    assert usage == Usage(output_tokens=usage.output_tokens)
    return usage.output_tokens
