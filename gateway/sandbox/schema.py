"""A JSON value that fits a JSON Schema: arguments of a tool call, structured outputs. Pure.

Read are the keywords that OpenAI's structured outputs allow: type, properties, items, enum, const, anyOf,
oneOf, allOf, $ref, $defs, format and the bounds of numbers, strings and arrays. `pattern` is not satisfied.
"""

from __future__ import annotations

import math
from typing import Any

from gateway.sandbox.fields import SandboxError
from gateway.sandbox.wire import encode

# References let a short schema ask for an endless value; these two hold it.
_MOST_VALUES = 2000
_MOST_CHARACTERS = 20_000
# Past this depth optional properties are left out and unions take their plainest side, so that a schema
# which refers to itself comes to an end.
_COMFORTABLE_DEPTH = 5
_DEEPEST = 40

_FORMATS = {
    "date": "2025-01-01",
    "time": "12:00:00Z",
    "date-time": "2025-01-01T12:00:00Z",
    "duration": "P1D",
    "email": "sandbox@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def example_of(schema: object, *, param: str) -> Any:
    """Return a value that fits, the same for the same schema; SandboxError 400 on `param` for a hopeless one."""
    return _Example(schema, param).value(schema, "value", 0)


class _Example:
    def __init__(self, root: object, param: str) -> None:
        self._root = root
        self._param = param
        self._values_left = _MOST_VALUES
        self._characters_left = _MOST_CHARACTERS

    def value(self, schema: object, name: str, depth: int) -> Any:
        self._values_left -= 1
        self._characters_left -= len(name)
        if self._values_left < 0 or self._characters_left < 0 or depth > _DEEPEST:
            raise self._hopeless("it asks for too much, or too deeply nested")
        if not isinstance(schema, dict):
            return f"sandbox {name}"
        for keyword in ("const", "default"):
            if keyword in schema:
                return self._given(schema[keyword])
        if isinstance(options := schema.get("enum"), list) and options:
            return self._given(options[0])
        if "$ref" in schema:
            return self.value(self._resolve(schema["$ref"]), name, depth + 1)
        for keyword in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(keyword), list) and branches:
                return self.value(self._branch(branches, depth), name, depth + 1)
        if isinstance(parts := schema.get("allOf"), list) and parts:
            return self._merged(schema, parts, name, depth)
        return self._of_type(schema, name, depth)

    def _given(self, value: object) -> object:
        self._characters_left -= len(encode(value))
        return value

    def _of_type(self, schema: dict[str, Any], name: str, depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = "null" if depth > _COMFORTABLE_DEPTH and "null" in kind else next(iter(kind), None)
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, depth)
        if kind == "array" or (kind is None and "items" in schema):
            return self._array(schema, name, depth)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        if kind == "boolean":
            return True
        if kind == "null":
            return None
        return self._string(schema, name)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties")
        required = schema.get("required")
        if not isinstance(properties, dict):
            return {}
        if depth > _COMFORTABLE_DEPTH:
            needed = required if isinstance(required, list) else []
            properties = {name: inner for name, inner in properties.items() if name in needed}
        return {name: self.value(inner, name, depth + 1) for name, inner in properties.items()}

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        least = _bound(schema, "minItems", 0)
        most = _bound(schema, "maxItems", _MOST_VALUES)
        wanted = max(least, 0 if depth > _COMFORTABLE_DEPTH else min(1, most))
        if wanted > _MOST_VALUES:
            raise self._hopeless("it asks for too much")
        return [self.value(schema.get("items"), name, depth + 1) for _ in range(int(wanted))]

    def _string(self, schema: dict[str, Any], name: str) -> str:
        known = _FORMATS.get(str(schema.get("format")))
        text = known or f"sandbox {name}"
        least = _bound(schema, "minLength", 0)
        if least > _MOST_CHARACTERS:
            raise self._hopeless("it asks for too much")
        self._characters_left -= int(least)
        most = _bound(schema, "maxLength", _MOST_CHARACTERS)
        return text.ljust(int(least), "-")[: int(max(most, 0))]

    def _number(self, schema: dict[str, Any], *, whole: bool) -> int | float:
        try:
            return _number_within(schema, whole=whole)
        except OverflowError as exc:
            raise self._hopeless("its bounds are out of range") from exc

    def _branch(self, branches: list[Any], depth: int) -> object:
        if depth > _COMFORTABLE_DEPTH:
            for branch in branches:
                if isinstance(branch, dict) and "$ref" not in branch and branch.get("type") != "object":
                    return branch
        return branches[0]

    def _merged(self, schema: dict[str, Any], parts: list[Any], name: str, depth: int) -> Any:
        values = [self.value(part, name, depth + 1) for part in parts]
        if "properties" in schema:
            values.append(self._object(schema, depth))
        if all(isinstance(value, dict) for value in values):
            return {key: inner for value in values for key, inner in value.items()}
        return values[0]

    def _resolve(self, reference: object) -> object:
        """Return what a reference inside the same schema names, e.g. `#/$defs/step` (RFC 6901)."""
        target = self._root
        text = str(reference)
        if not text.startswith("#"):
            raise self._hopeless("references must stay inside it")
        for raw in text[1:].split("/")[1:]:
            step = raw.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or step not in target:
                raise self._hopeless(f"there is nothing at '{text[:100]}'")
            target = target[step]
        return target

    def _hopeless(self, why: str) -> SandboxError:
        return SandboxError(
            400,
            f"Invalid schema for '{self._param}': {why}.",
            param=self._param,
            code="invalid_json_schema",
        )


def _bound(schema: dict[str, Any], keyword: str, default: float) -> float:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _number_within(schema: dict[str, Any], *, whole: bool) -> int | float:
    """Return the number nearest to 1 inside the bounds, stepped up to `multipleOf`."""
    step = _bound(schema, "multipleOf", 0)
    nudge = 1 if whole else 0.5
    least = max(_bound(schema, "minimum", -math.inf), _bound(schema, "exclusiveMinimum", -math.inf) + nudge)
    most = min(_bound(schema, "maximum", math.inf), _bound(schema, "exclusiveMaximum", math.inf) - nudge)
    value = min(max(1.0, least), most)
    if step > 0:
        value = math.ceil(value / step) * step
    return math.ceil(value) if whole else value
