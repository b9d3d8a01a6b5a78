"""What the practice upstream makes of a schema, and of a text: an example, tokens and pieces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sandbox.fields import SandboxError
from gateway.sandbox.schema import example_of
from gateway.sandbox.tokens import first_tokens, pieces_of, tokens_in


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "format": "date"}, "2025-01-01"),
        ({"type": "string", "maxLength": 3}, "san"),
        ({"type": "string", "minLength": 20}, "sandbox value-------"),
        ({"enum": ["b", "a"]}, "b"),
        ({"const": {"x": 1}}, {"x": 1}),
        ({"type": "integer", "exclusiveMinimum": 4, "multipleOf": 4}, 8),
        ({"type": "number", "maximum": 0.25}, 0.25),
        ({"type": ["null", "string"]}, None),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 0}, []),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}, {"a": 1, "b": 2}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 7}}}, 7),
        ({}, "sandbox value"),
    ],
)
def test_an_example_fits_its_schema(schema: dict[str, Any], value: Any) -> None:
    assert example_of(schema, param="p") == value


def test_a_schema_that_holds_itself_comes_to_an_end() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["next"],
    }
    value = example_of({"$ref": "#/$defs/node", "$defs": {"node": node}}, param="p")
    depth = 0
    while value is not None:
        value, depth = value["next"], depth + 1
    assert depth > 1


_TWINS: dict[str, Any] = {"required": ["a", "b"], "properties": {name: {"$ref": "#"} for name in "ab"}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/absent"},
        {"$ref": "https://example.com/schema"},
        _TWINS,
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**9},
        {"type": "array", "minItems": 1999, "items": {"const": "x" * 1000}},
        {"type": "number", "minimum": 1e308, "multipleOf": 1e-308},
    ],
)
def test_a_hopeless_schema_is_a_400_and_no_work(schema: dict[str, Any]) -> None:
    with pytest.raises(SandboxError) as caught:
        example_of(schema, param="p")
    assert (caught.value.status, caught.value.param) == (400, "p")


@given(st.lists(st.text(max_size=3) | st.sampled_from(["a ", "你", "👩\u200d👧", "葛\U000e0100"])), st.integers(1, 6))
def test_pieces_joined_are_the_text(parts: list[str], at_most: int) -> None:
    text = "".join(parts)
    pieces = pieces_of(text, at_most=at_most)
    assert "".join(pieces) == text
    assert len(pieces) <= at_most


@given(st.text(), st.integers(1, 20))
def test_first_tokens_are_a_prefix_within_the_limit(text: str, limit: int) -> None:
    head = first_tokens(text, limit)
    assert text.startswith(head)
    assert tokens_in(head) == min(limit, tokens_in(text))
