"""What a client's message on a WebSocket asks for, as far as limits must know it. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

from gateway.usage.shapes import UNREADABLE, name_in

_MOST_MEMBERS = 1000
_NULL = b"null"


class ClientMessage(Struct, frozen=True):
    """`models` are all that it names, each once; `body` is the message, in bytes."""

    kind: str
    body: bytes
    event_id: str = ""
    service_tier: str = ""
    models: tuple[str, ...] = ()


def client_message(message: str | bytes) -> ClientMessage | None:
    """Return what a message asks for; None if another reader of JSON might find something else in it.

    Models stand in the message itself (responses over a socket), in its `session` or in its `response` (realtime).
    """
    try:
        body = message.encode() if isinstance(message, str) else message
        outer = _members(body)
        inner = {name: _members(outer[name]) for name in ("response", "session") if _is_there(outer, name)}
        named = [_named(members, "model") for members in (outer, *inner.values())]
        kind = _named(outer, "type")
        tier = _named(outer, "service_tier")
    except UNREADABLE:
        return None
    if not kind:
        return None
    models = tuple(dict.fromkeys(model for model in named if model))
    return ClientMessage(kind, body, name_in(outer.get("event_id", Raw())), tier, models)


class _Name:
    """The name of a member, as a key that equals no other: nothing that stands twice is lost."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _Names:
    """Makes so many names; who sends more shall not hold others up."""

    def __init__(self) -> None:
        self._left = _MOST_MEMBERS

    def __call__(self, kind: Any, text: str) -> _Name:
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many members")
        return _Name(text)


def _members(data: bytes | Raw) -> dict[str, Raw]:
    """Return the members of an object; ValueError where one stands twice, which each reader takes as it likes."""
    found = msgspec.json.decode(data, type=dict[_Name, Raw], dec_hook=_Names())
    members = {name.text: value for name, value in found.items()}
    if len(members) < len(found):
        raise ValueError("a member stands twice")
    return members


def _is_there(members: dict[str, Raw], name: str) -> bool:
    return name in members and bytes(members[name]) != _NULL


def _named(members: dict[str, Raw], name: str) -> str:
    """Return a member that is a name, "" if it is not there; ValueError for anything else."""
    if not _is_there(members, name):
        return ""
    found = name_in(members[name])
    if not found:
        raise ValueError("no name")
    return found
