"""POST /v1/embeddings: unit vectors in which texts that share words are near each other."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
import sys
from array import array
from collections import Counter

import msgspec

from gateway.sandbox.fields import wrong_value
from gateway.sandbox.routes.completions import read_texts
from gateway.sandbox.shelf import Stock
from gateway.sandbox.wire import JSON_TYPE, Answer, Call

# The first two are OpenAI's own limits; the last bounds one answer.
_MOST_TOKENS_PER_INPUT = 8192
_MOST_TOKENS = 300_000
_MOST_NUMBERS = 2048 * 1536

_WORD = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]|[^\w\s]+")


def create(call: Call, stock: Stock) -> Answer:
    fields = call.fields
    model = fields.model()
    texts = read_texts(fields.raw("input"), "input")
    tokens = _checked_tokens([count for _, count in texts])
    most = 3072 if model.endswith("-large") else 1536
    dimensions = fields.whole("dimensions", least=1, most=3072) or most
    if len(texts) * dimensions > _MOST_NUMBERS:
        raise wrong_value("input", f"the sandbox gives at most {_MOST_NUMBERS} numbers, inputs times dimensions.")
    packed = fields.choice("encoding_format", ("float", "base64"), "float") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _pack(vector) if packed else vector}
        for index, vector in enumerate(vector_of(text, dimensions) for text, _ in texts)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    # Not wire.encode(): msgspec writes a million floats ten times as fast.
    body = msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})
    return Answer(200, JSON_TYPE, body)


def vector_of(text: str, dimensions: int) -> list[float]:
    """Return a vector of length 1: every word moves 4 coordinates (feature hashing), the text one more."""
    vector = [0.0] * dimensions
    for word, count in Counter(_WORD.findall(text.lower())).items():
        for place in struct.unpack("<4i", hashlib.blake2b(word.encode(), digest_size=16).digest()):
            # The lowest bit is the direction; the others choose the place.
            vector[(place >> 1) % dimensions] += count if place & 1 else -count
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    # Half a step never cancels whole ones, so that the length is never 0.
    vector[place % dimensions] += 0.5
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector]


def _checked_tokens(counts: list[int]) -> int:
    if max(counts) > _MOST_TOKENS_PER_INPUT:
        raise wrong_value(
            "input", f"an input has more than {_MOST_TOKENS_PER_INPUT} tokens.", "context_length_exceeded"
        )
    total = sum(max(1, count) for count in counts)
    if total > _MOST_TOKENS:
        raise wrong_value("input", f"more than {_MOST_TOKENS} tokens in one request.", "max_tokens_per_request")
    return total


def _pack(vector: list[float]) -> str:
    """Return base64 of little-endian 32-bit floats, as the API and its SDKs have it."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
