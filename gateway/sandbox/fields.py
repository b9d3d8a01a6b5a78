"""A request's parameters, read with OpenAI's complaints: 400, the parameter named. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class SandboxError(Exception):
    """An answer in OpenAI's error shape: `kind` is its `type`; `headers` are added to the response's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers


def missing(name: str) -> SandboxError:
    return SandboxError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def wrong_type(name: str, wanted: str, value: object) -> SandboxError:
    return SandboxError(
        400,
        f"Invalid type for '{name}': expected {wanted}, but got {_json_type(value)} instead.",
        param=name,
        code="invalid_type",
    )


def wrong_value(name: str, message: str, code: str = "invalid_value") -> SandboxError:
    return SandboxError(400, f"Invalid value for '{name}': {message}", param=name, code=code)


def too_many(name: str, most: int) -> SandboxError:
    return wrong_value(name, f"an array of at most {most} is allowed.", "array_above_max_length")


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "an integer", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), "something else")


# Names stand in every event of a stream, so their length is bounded.
LONGEST_NAME = 256
# OpenAI's own bound for messages and for the parts of one.
MOST_ITEMS = 2048


@dataclass(frozen=True, slots=True)
class Fields:
    """The parameters of one request. In a `form` everything is text, so numbers and flags are read from text.

    Every reader treats null as absent and raises SandboxError 400 on another type than it names.
    """

    values: Mapping[str, Any]
    form: bool = False

    def raw(self, name: str) -> Any:
        return self.values.get(name)

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        return value

    def required_text(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise missing(name)
        return value

    def model(self, default: str | None = None) -> str:
        """Return the model's name; any name will do, up to 256 characters."""
        name = self.text("model") or default
        if not name:
            raise missing("model")
        if len(name) > LONGEST_NAME:
            raise wrong_value("model", f"longer than {LONGEST_NAME} characters.", "string_above_max_length")
        return name

    def choice(self, name: str, options: Sequence[str], default: str) -> str:
        value = self.text(name)
        if value is None:
            return default
        if value not in options:
            raise wrong_value(name, f"'{value[:100]}'. Supported values are: {', '.join(map(repr, options))}.")
        return value

    def whole(self, name: str, *, least: int, most: int) -> int | None:
        value = self.values.get(name)
        if self.form and isinstance(value, str):
            value = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, "an integer", value)
        if value < least:
            raise wrong_value(name, f"must be at least {least}.", "integer_below_min_value")
        if value > most:
            raise wrong_value(name, f"must be at most {most}.", "integer_above_max_value")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if self.form and isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(name, "a boolean", value)
        return bool(value)

    def items(self, name: str, *, most: int = MOST_ITEMS) -> list[Any]:
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise wrong_type(name, "an array", value)
        if len(value) > most:
            raise too_many(name, most)
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        return value
