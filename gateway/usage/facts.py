"""What a request asks for, as far as metering must know it. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from msgspec import Raw, Struct

from gateway.endpoints import Endpoint, Meter
from gateway.usage.shapes import UNREADABLE, name_in

_MOST_TEXT = 4 << 20
_MOST_HEAD_BYTES = 64 << 10
_MOST_CHOICES = 1024
_MOST_PART_HEAD_BYTES = 4 << 10
_BOUNDARY = re.compile(rb'boundary="?([^";,\s]{1,200})', re.IGNORECASE)
_FIELD_NAME = re.compile(rb';\s*name="?([^";\r\n]{1,100})', re.IGNORECASE)


class RequestFacts(Struct, frozen=True):
    """`choices` is `n`, 1 if left out; `characters` is the length of what shall be spoken.

    `has_stream_options`: the member is there, be it null. `in_background`: the answer comes before its usage does.
    `form_bytes` is how much of a form was looked at, where it was: `files` are in it, and `text_bytes` beside them.
    """

    model: str = ""
    service_tier: str = ""
    is_stream: bool = False
    has_stream_options: bool = False
    includes_usage: bool = False
    in_background: bool = False
    choices: int = 1
    characters: int = 0
    form_bytes: int = 0
    files: int = 0
    text_bytes: int = 0

    @property
    def dearer_tier(self) -> str:
        """The tier that was asked for where it costs more than none; a cheaper one is not believed to who asks."""
        return self.service_tier if self.service_tier == "priority" else ""


class PromptSample(Struct, frozen=True):
    """The text of a prompt, tools and schemas included, for an estimate of its tokens.

    `messages` and `images` are counts, for what each of them costs beside the text; `tokens` those of a prompt
    that was sent as tokens. `left_out_chars` is what was too long to be kept.
    """

    text: str = ""
    tokens: int = 0
    messages: int = 0
    images: int = 0
    left_out_chars: int = 0


class _Body(Struct):
    model: Raw = Raw()
    stream: Raw = Raw()
    stream_options: Raw = Raw()
    service_tier: Raw = Raw()
    background: Raw = Raw()
    n: Raw = Raw()
    input: Raw = Raw()


class _StreamOptions(Struct):
    include_usage: bool | None = None


_body_in = msgspec.json.Decoder(_Body).decode
_stream_options_in = msgspec.json.Decoder(_StreamOptions).decode
_text_in = msgspec.json.Decoder(str).decode
_count_in = msgspec.json.Decoder(int).decode


def request_facts(endpoint: Endpoint, body: bytes) -> RequestFacts | None:
    """Return the facts of a JSON request; None if it is no JSON object, or of a kind that no upstream would take."""
    try:
        read = _body_in(body)
    except UNREADABLE:
        return None
    return _facts(read, characters=_characters(read.input) if endpoint.meter is Meter.SPEECH else 0)


def facts_of(members: dict[str, bytes]) -> RequestFacts:
    """Return the facts of a request of which these members are known, as JSON."""
    return _facts(_Body(**{name: Raw(members[name]) for name in _Body.__struct_fields__ if name in members}))


def _facts(read: _Body, *, characters: int = 0) -> RequestFacts:
    return RequestFacts(
        name_in(read.model),
        name_in(read.service_tier) if read.service_tier else "",
        bytes(read.stream) == b"true",
        bool(read.stream_options),
        bool(read.stream_options) and _includes_usage(read.stream_options),
        bytes(read.background) == b"true",
        _choices(read.n) if read.n else 1,
        characters,
    )


def multipart_facts(head: bytes, content_type: bytes, tail: bytes = b"") -> RequestFacts:
    """Return the facts of a multipart form, of which `head` is the beginning and `tail` the end.

    Of the head 64 KiB are looked at, of the tail as much: between them stands the file. A field that is
    cut is no field.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        return RequestFacts()
    delimiter = b"--" + found[1]
    fields = _fields(tail[-_MOST_HEAD_BYTES:], delimiter) | _fields(head[:_MOST_HEAD_BYTES], delimiter)
    return RequestFacts(
        _field_name(fields, b"model"),
        _field_name(fields, b"service_tier"),
        fields.get(b"stream", b"").strip().lower() == b"true",
        choices=_choices(fields.get(b"n", b"1").strip()),
    )


def weighed_form(facts: RequestFacts, form: bytes, content_type: bytes) -> RequestFacts:
    """Return the facts of a form with what is in it, as far as it is here; without a boundary all of it is text."""
    found = _BOUNDARY.search(content_type)
    delimiter = b"\r\n--" + found[1] if found else b""
    files, text_bytes, start = 0, 0, 0
    while start < len(form):
        end = form.find(delimiter, start + 1) if delimiter else -1
        end = len(form) if end < 0 else end
        head = form[start : min(end, start + _MOST_PART_HEAD_BYTES)].partition(b"\r\n\r\n")[0]
        if b"filename" in head.lower():
            files += 1
        else:
            text_bytes += end - start
        start = end
    return msgspec.structs.replace(facts, form_bytes=len(form), files=files, text_bytes=text_bytes)


def prompt_sample(body: bytes, *, max_text: int = _MOST_TEXT) -> PromptSample:
    """Return what a JSON request gives the model to read. Costs milliseconds: not for the event loop.

    Of a body that cannot be read as JSON, all of it is the text.
    """
    try:
        request = _loads(body.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        text = body[:max_text].decode("utf-8", "replace")
        return PromptSample(text, messages=1, left_out_chars=max(len(body) - max_text, 0))
    if not isinstance(request, dict):
        return PromptSample()
    walk = _Walk(max_text)
    for name in _PROMPT_MEMBERS:
        if name in request:
            walk.over(request[name])
    for name in ("messages", "input"):
        if isinstance(request.get(name), list):
            walk.messages += len(request[name])
    text = "\n".join(walk.texts).encode("utf-8", "replace").decode()  # no half of a surrogate pair
    return PromptSample(text, walk.tokens, max(walk.messages, 1), walk.images, walk.left_out)


_PROMPT_MEMBERS = ("instructions", "messages", "prompt", "input", "tools", "functions", "response_format", "text")
_IMAGE_MEMBERS = {"image_url", "input_image"}
# Data, or a name for it: no model reads these as text.
_SILENT = {"type", "role", "id", "call_id", "tool_call_id", "status", "detail", "format", "cache_control"}
_DATA = {"image_url", "file_data", "data", "file_id", "file_url", "url", "encrypted_content", "b64_json"}


class _Walk:
    """Collects the text in a decoded request, in order, without recursion."""

    def __init__(self, max_text: int) -> None:
        self.texts: list[str] = []
        self.tokens = self.messages = self.images = self.left_out = 0
        self._room = max_text

    def over(self, value: object) -> None:
        waiting: list[object] = [value]
        while waiting:
            value = waiting.pop()
            if isinstance(value, str):
                self._keep(value)
            elif isinstance(value, list):
                self.tokens += sum(isinstance(element, int) for element in value)
                waiting.extend(reversed(value))
            elif isinstance(value, dict):
                self.images += value.get("type") in _IMAGE_MEMBERS if isinstance(value.get("type"), str) else 0
                waiting.extend(reversed(list(_readable(value))))

    def _keep(self, text: str) -> None:
        kept = text[: self._room]
        self._room -= len(kept)
        self.left_out += len(text) - len(kept)
        if kept:
            self.texts.append(kept)


def _readable(value: dict[str, Any]) -> list[object]:
    """Return the members of an object that a model reads; the keys of a schema are read as well."""
    is_schema = "properties" in value
    found: list[object] = [*value["properties"]] if is_schema and isinstance(value["properties"], dict) else []
    for name, member in value.items():
        if name not in _DATA and not (name in _SILENT and isinstance(member, str)):
            found.append(member)
    return found


def _loads(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except UNREADABLE:
        return json.loads(body)


def _includes_usage(raw: Raw) -> bool:
    try:
        return _stream_options_in(raw).include_usage is True
    except UNREADABLE:
        return False


def _choices(raw: Raw | bytes) -> int:
    try:
        return min(max(_count_in(raw), 1), _MOST_CHOICES)
    except UNREADABLE:
        return 1


def _characters(raw: Raw) -> int:
    try:
        return len(_text_in(raw))
    except UNREADABLE:
        return 0


def _fields(data: bytes, delimiter: bytes) -> dict[bytes, bytes]:
    """Return the fields that stand whole in a piece of a form, by name; the first of equal names."""
    fields: dict[bytes, bytes] = {}
    # What precedes the first delimiter is the rest of a part, what follows the last one may be cut.
    for part in data.split(delimiter)[1:-1]:
        headers, _, value = part.partition(b"\r\n\r\n")
        name = _FIELD_NAME.search(headers)
        if name and b"filename" not in headers and value.endswith(b"\r\n"):
            fields.setdefault(name[1], value[:-2])
    return fields


def _field_name(fields: dict[bytes, bytes], name: bytes) -> str:
    value = fields.get(name, b"")[:400]
    try:
        return name_in(msgspec.json.encode(value.decode()))
    except UNREADABLE:
        return ""
