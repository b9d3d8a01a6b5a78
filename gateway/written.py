"""About how many tokens an event stream has brought so far. Pure."""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, Struct

_EVENT_END = re.compile(rb"\n\n|\r\r|\r\n\r\n")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_TEXT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|refusal|arguments|text|delta|value)"\s*:\s*"((?:[^"\\]|\\.)*)'
)
# About what tokenizers split text into, rather smaller. A word of up to eight letters is one token, usually; what a
# longer one has beyond that is nonsense, base64 or German, and comes in pairs, as capitals do. Of other alphabets: a
# character of Chinese, two of Cyrillic, half an emoji. And groups of digits, the blank before them, marks.
_PIECE = re.compile(
    rb"(?:\\u0[0-7][0-9A-Fa-f]{2}){1,2}|\\u[0-9A-Fa-f]{4}|\\."
    rb"|[A-Z][a-z]{1,7}|(?<![a-z])[a-z]{1,8}|[a-z]{1,2}|[A-Z]{1,2}"
    rb"|[0-9]{1,3}| (?=[0-9])"
    rb"|(?:[\xc0-\xdf][\x80-\xbf]){1,2}|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xff]|[\x80-\xbf]{1,3}"
    rb"|[^\sA-Za-z0-9\x80-\xff]"
)
# Names of what says nothing: OpenAI's, and those of other makers, have no "delta" in them.
_TYPED = (b"response.", b"thread.", b"transcript.", b"speech.", b"image_", b"message_", b"content_block_", b"ping")
_SAYS_NOTHING = (b"", b"null", b'""', b"[]", b"{}")
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _Event(Struct):
    type: str | None = None
    choices: list[Raw] | None = None


class _Choice(Struct):
    delta: dict[str, Raw] | None = None
    text: Raw = Raw()


_event_in = msgspec.json.Decoder(_Event).decode
_choice_in = msgspec.json.Decoder(_Choice).decode


def tokens_in_events(events: bytes) -> int:
    """Return about how many tokens a piece of an event stream brings, rather too many than too few.

    Only what is new counts: neither the role and the end of an answer, nor its usage, nor events that say all of it
    again, such as `response.completed`. Most upstreams send an event for each token, some several tokens in one.
    """
    return sum(_tokens_in_event(event) for event in _EVENT_END.split(events) if event)


def _tokens_in_event(event: bytes) -> int:
    name, data = _fields(event)
    return tokens_in_message(data, name=name) if data and data != b"[DONE]" else 0


def tokens_in_message(data: bytes, *, name: bytes = b"") -> int:
    """Return the same of what one event says in JSON, or of a message on a WebSocket."""
    try:
        read = _event_in(data)
    except _UNREADABLE:
        return 0 if _says_nothing_new(name) else max(1, _pieces(data))
    if read.choices is not None:
        return sum(map(_tokens_in_choice, read.choices))
    return 0 if _says_nothing_new((read.type or "").encode() or name) else max(1, _pieces(data))


def _fields(event: bytes) -> tuple[bytes, bytes]:
    """Return an event's name and its data; a part of an event that was too long to wait for is all data."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return b"", event[6:]
    name, data = b"", []
    for line in _LINE_END.split(event):
        field, colon, value = line.partition(b":")
        if field == b"data":
            data.append(value.strip(b" "))
        elif field == b"event":
            name = value.strip(b" ")
        elif field and not (colon and field in (b"id", b"retry")):
            data.append(line)
    return name, b"\n".join(data)


def _says_nothing_new(name: bytes) -> bool:
    return name.startswith(_TYPED) and b"delta" not in name


def _tokens_in_choice(choice: Raw) -> int:
    try:
        read = _choice_in(choice)
    except _UNREADABLE:
        return max(1, _pieces(bytes(choice)))
    said = b"".join(b'"%b":%b,' % (name.encode(), bytes(raw)) for name, raw in _news(read))
    return max(1, _pieces(said)) if said else 0


def _news(choice: _Choice) -> list[tuple[str, Raw]]:
    members = [*(choice.delta or {}).items(), ("text", choice.text)]
    return [(name, raw) for name, raw in members if name != "role" and bytes(raw) not in _SAYS_NOTHING]


def _pieces(data: bytes) -> int:
    return sum(len(_PIECE.findall(text)) for text in _TEXT.findall(data))
