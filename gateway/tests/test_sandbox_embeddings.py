"""The practice upstream's embeddings: unit vectors, near where texts are."""

from __future__ import annotations

import base64
import math
import struct

import httpx2 as httpx
import pytest
from openai import AsyncOpenAI
from openai.types import CreateEmbeddingResponse

from gateway.sandbox.routes.embeddings import vector_of
from gateway.tests.sandbox_clients import strictly


async def test_embeddings_are_unit_vectors_the_same_in_both_encodings(
    sdk: AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    asked = {"model": "text-embedding-3-small", "input": ["Hello 你好", "x"], "dimensions": 256}
    plain = (await http.post("/v1/embeddings", json=asked)).json()
    strictly(CreateEmbeddingResponse, plain)
    packed = (await http.post("/v1/embeddings", json=asked | {"encoding_format": "base64"})).json()
    for one, other in zip(plain["data"], packed["data"], strict=True):
        numbers = struct.unpack("<256f", base64.b64decode(other["embedding"]))
        assert one["embedding"] == pytest.approx(numbers, abs=1e-6)
        assert math.hypot(*one["embedding"]) == pytest.approx(1)
    by_sdk = await sdk.embeddings.create(**asked)  # the SDK asks for base64 and unpacks it
    assert by_sdk.data[1].embedding == pytest.approx(plain["data"][1]["embedding"], abs=1e-6)
    assert by_sdk.usage.total_tokens == by_sdk.usage.prompt_tokens == 3 + 1


async def test_embeddings_have_the_usual_number_of_dimensions(sdk: AsyncOpenAI) -> None:
    small = await sdk.embeddings.create(model="text-embedding-3-small", input=[1, 2, 3])
    large = await sdk.embeddings.create(model="text-embedding-3-large", input=[[1], [2]])
    assert len(small.data[0].embedding) == 1536
    assert [len(item.embedding) for item in large.data] == [3072, 3072]


def test_texts_that_share_words_are_near() -> None:
    cat, cats, tax = (vector_of(text, 512) for text in ("the cat sat", "a cat sat down", "quarterly tax report"))
    near = sum(map(float.__mul__, cat, cats))
    far = sum(map(float.__mul__, cat, tax))
    assert near > far + 0.2
    assert vector_of("", 1) == [1.0]
