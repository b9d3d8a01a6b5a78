"""Members of a JSON object found in bytes that are no whole JSON text: cut, unreadable for a parser, or only kept
in part. Pure.

A name within a string cannot be mistaken for a member: its quotes are escaped there.
"""

from __future__ import annotations

import re

# A string, whole or cut off at the end of the data; or what gives JSON its structure.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[{}\[\]:,]', re.DOTALL)
# The same in reversed bytes, where a quote that is followed by an odd number of backslashes is an escaped one.
_TOKEN_REVERSED = re.compile(rb'"[^"]*(?:"(?=\\(?:\\\\)*(?!\\))[^"]*)*"?|[{}\[\]:,]')
_USUAL_END_BYTES = 4 << 10
_QUOTE, _COLON, _COMMA = b'":,'
_OPENING, _CLOSING = b"{[", b"}]"


def first_members(data: bytes) -> tuple[dict[str, bytes], bool]:
    """Return the top-level members that stand whole at the beginning of an object's text, as JSON, and whether
    the object is closed.

    The last of equal names wins. Needs no valid JSON behind or within them, and no end.
    """
    members: dict[str, bytes] = {}
    if data.lstrip()[:1] != b"{":
        return members, False
    depth = 0
    name: bytes | None = None
    string = b""
    value_from = 0
    for match in _TOKEN.finditer(data):
        token = data[match.start()]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        if depth == 1 and token == _QUOTE and name is None:
            string = match[0]
        elif depth == 1 and token == _COLON:
            name, value_from = string, match.end()
        elif name is not None and (depth == 0 or (depth == 1 and token == _COMMA)):
            members[_name(name)] = data[value_from : match.start()].strip()
            name = None
        if depth == 0:
            return members, True
    return members, False


def last_members(data: bytes, *, depth_wanted: int = 1) -> dict[str, bytes]:
    """Return the members that stand whole at the end of an object's text, as JSON.

    `data` must be the end of a whole object, from anywhere on. With `depth_wanted=2` the members of the objects
    that are members of it.
    """
    members: dict[str, bytes] = {}
    if not data.rstrip().endswith(b"}"):
        return members
    backwards = data[::-1]
    size = len(data)
    depth = 0
    value: bytes | None = None
    value_from = 0
    for match in _TOKEN_REVERSED.finditer(backwards):
        token = backwards[match.start()]
        if token in _CLOSING:
            depth += 1
            if depth == depth_wanted:
                value_from = match.end()
        elif token in _OPENING:
            depth -= 1
            if depth == 0:
                break
        elif depth == depth_wanted:
            if token == _COLON:
                value = data[size - match.start() : size - value_from].strip()
            elif token == _COMMA:
                value_from = match.end()
            elif value is not None:
                # Read from the end, the first of equal names is the last of them, which wins.
                members.setdefault(_name(match[0][::-1]), value)
                value = None
    return members


def members_at_end(tail: bytes, *, depth_wanted: int = 1) -> dict[str, bytes]:
    """Return `last_members` from as little of the end as has a usage in it, or from all of it."""
    members = last_members(tail[-_USUAL_END_BYTES:], depth_wanted=depth_wanted)
    return members if "usage" in members else last_members(tail, depth_wanted=depth_wanted)


def _name(string: bytes) -> str:
    return string.strip(b'"').decode("ascii", "replace")


def count_of_member(data: bytes, name: str) -> int:
    """Return how many top-level members of a valid object have this name."""
    depth = count = 0
    string = b""
    for match in _TOKEN.finditer(data):
        token = data[match.start()]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 1 and token == _QUOTE:
            string = match[0]
        elif depth == 1 and token == _COLON:
            count += _name(string) == name
    return count
