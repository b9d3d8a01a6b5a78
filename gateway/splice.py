"""Usage asked for where the client did not ask: into the request as bytes, and out of the answer again. Pure."""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, Struct

from gateway.usage.members import count_of_member

_MOST_BODY_BYTES = 4 << 20
# A name that occurs again is looked for at 40 ns a byte.
_MOST_SEARCHED_BYTES = 256 << 10
_MOST_CANDIDATES = 8
# What no upstream sends at once, and what would take tens of milliseconds to look at.
_MOST_LINES = 16_384
_MEMBER = b'"stream_options":{"include_usage":true},'
_STREAM = b'"stream"'
_USAGE = b'"usage"'
_BOM = b"\xef\xbb\xbf"
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\r\n", b"\n\r")
_LF_OF_AN_END = b"\n"  # whose CR has gone out before
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
# Null usage with nothing but plain members between it and the end of the only event: so it is a member of the
# outermost object. Seen of OpenAI: nothing behind it, or "obfuscation".
_NULL_AND_END = re.compile(rb',"usage":null((?:,"[^"\\]*":(?:"[^"\\]*"|[-+.\w]+))*\}\n\n)\Z')
_NULL = re.compile(rb'"usage"[ \t\r\n]*:[ \t\r\n]*null')
_COMMA_BEFORE = re.compile(rb",[ \t\r\n]*\Z")
_COMMA_BEHIND = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")


class _Request(Struct):
    stream: Raw = Raw()
    stream_options: Raw = Raw()


class _Chunk(Struct):
    choices: Raw = Raw()
    usage: Raw = Raw()


_request_in = msgspec.json.Decoder(_Request).decode
_chunk_in = msgspec.json.Decoder(_Chunk).decode


def with_include_usage(body: bytes, *, max_bytes: int = _MOST_BODY_BYTES) -> bytes | None:
    """Return the request with `stream_options.include_usage` set; None if it is to be passed as it is.

    Only a JSON object with `"stream": true`, said once, and no `stream_options`, not even null, is changed: by one
    member at its beginning. Every other byte stays.
    """
    if len(body) > max_bytes:
        return None
    try:
        request = _request_in(body)
        if not body.isascii():
            str(body, "utf-8")  # the parser does not ask it of members that it skips; JSON is UTF-8 (RFC 8259 §8.1)
    except _UNREADABLE:
        return None
    if bytes(request.stream) != b"true" or request.stream_options:
        return None
    # Parsers differ in which of two equal names they believe; nested ones are none of our business.
    if body.count(_STREAM) != 1 and (len(body) > _MOST_SEARCHED_BYTES or count_of_member(body, "stream") != 1):
        return None
    start = body.index(b"{") + 1
    return b"%b%b%b" % (body[:start], _MEMBER, body[start:])


class UsageEventRemover:
    """Takes out of a stream what `include_usage` adds to it: the one event of usage without choices, and the
    member `"usage":null` of every other chunk.

    Works on pieces as `EventAligner` gives them: whole events, or a part of one that is too long, which passes as
    it is. What an upstream sends of its own accord passes as well: usage in a chunk that has choices, a second
    event of usage, null in an event of several data lines.
    """

    def __init__(self) -> None:
        self._is_within_event = False
        self._is_removed = False
        self._removed_cr = False  # what went last ended with it: an LF behind it is its own

    def feed(self, piece: bytes) -> bytes:
        """Return what is to be passed on of a piece, possibly b""."""
        if self._removed_cr and piece:
            self._removed_cr = False
            piece = piece.removeprefix(_LF_OF_AN_END)
        is_whole = piece.endswith(_EVENT_ENDS)
        at = piece.rfind(_USAGE)
        if at < 0:
            if piece and piece != _LF_OF_AN_END:
                self._is_within_event = not is_whole
            return piece
        if self._is_within_event or not is_whole:
            return self._without_usage(piece)
        # Nearly every chunk: one event in one line.
        if piece.startswith(b"data:") and piece.find(b"\n") == len(piece) - 2 and piece.find(b"\r") < 0:
            null = _NULL_AND_END.match(piece, at - 1)
            if null is not None:
                return piece[: at - 1] + null[1]
        return self._without_usage(piece)

    def _without_usage(self, piece: bytes) -> bytes:
        """Return the piece, which may begin or end within an event, without what was added."""
        if piece.count(b"\n") + piece.count(b"\r") > _MOST_LINES:
            self._is_within_event = not piece.endswith(_EVENT_ENDS)
            return piece
        out: list[bytes] = []
        event: list[bytes] = []
        for line in piece.splitlines(keepends=True):
            event.append(line)
            if not line.strip(b"\r\n"):
                out.append(self._event(event))
                event = []
        if event:
            out.append(self._event(event))
        self._is_within_event = bool(piece) and not piece.endswith(_EVENT_ENDS)
        self._removed_cr = piece.endswith(b"\r") and not out[-1]
        return b"".join(out)

    def _event(self, lines: list[bytes]) -> bytes:
        event = b"".join(lines)
        if self._is_within_event:
            self._is_within_event = False
            return event
        if event.find(_USAGE) < 0:
            return event
        places = [place for place, line in enumerate(lines) if line.removeprefix(_BOM).startswith(b"data:")]
        data = b"\n".join(lines[place].removeprefix(_BOM)[5:].strip() for place in places)
        try:
            chunk = _chunk_in(data)
        except _UNREADABLE:
            return event
        usage = bytes(chunk.usage)
        if usage == b"null":
            if len(places) == 1:
                lines[places[0]] = _without_null(lines[places[0]], data)
            return b"".join(lines)
        if not self._is_removed and usage[:1] == b"{" and _is_empty(chunk.choices):
            self._is_removed = True
            return b""
        return event


def _is_empty(choices: Raw) -> bool:
    return bytes(choices).translate(None, b" \t\r\n") in (b"[]", b"null")


def _without_null(line: bytes, data: bytes) -> bytes:
    """Return a data line without the null usage of its outermost object; as it is, if there is any doubt."""
    start = line.index(data)
    for match in list(_NULL.finditer(data))[:_MOST_CANDIDATES]:
        before, behind = data[: match.start()], data[match.end() :]
        if comma := _COMMA_BEFORE.search(before[-64:]):
            before = before[: len(before) - len(comma[0])]
        elif comma := _COMMA_BEHIND.match(behind):
            behind = behind[comma.end() :]
        candidate = before + behind
        try:
            # A nested one taken out leaves the outermost one where it was.
            if not _chunk_in(candidate).usage:
                return line[:start] + candidate + line[start + len(data) :]
        except _UNREADABLE:
            continue
    return line
