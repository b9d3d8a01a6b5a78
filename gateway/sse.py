"""Server-sent events as bytes, whatever the chunk borders.

A line ends at CR LF, LF or CR, and at nothing else; an event ends at an empty line.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

_COMMON_ENDS = (b"\n\n", b"\r\n\r\n")
# Any line, then an empty one; with a last CR both may end in CRLF, whose LF belongs to them.
_ENDS = (b"\n\n", b"\n\r\n", b"\n\r", b"\r\r\n", b"\r\r")
_LONGEST_END = 3


class EventAligner:
    """Cuts a stream at ends of events only, so that clients which decode each piece by itself never see half
    a character. Every byte goes out, in order, none added.

    A part of an event waits for its rest, up to `max_waiting_bytes`; beyond that it goes out in parts.
    """

    def __init__(self, max_waiting_bytes: int) -> None:
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting = bytearray()
        self._may_want_lf = False  # what went out last ended with a CR
        self._is_in_parts = False  # an event of which a part has gone out

    @property
    def is_inside_event(self) -> bool:
        """Whether an event has begun that has not ended, be it gone out in part or waiting."""
        return self._is_in_parts or bool(self._waiting)

    def feed(self, chunk: bytes) -> bytes:
        """Return what may go out now, possibly b""."""
        waiting = self._waiting
        if self._may_want_lf and chunk:
            return self._behind_cr(chunk)
        if not waiting and chunk.endswith(_COMMON_ENDS):
            self._is_in_parts = False
            return chunk
        # Only the new bytes are searched, and the few before them in which an end may have begun.
        search_from = max(0, len(waiting) - _LONGEST_END)
        waiting += chunk
        end = _last_event_end(waiting, search_from)
        if end:
            self._is_in_parts = False
        elif len(waiting) <= self._max_waiting_bytes:
            return b""
        else:
            # The end of a line stays: with the next one it may be the end of the event.
            end = len(waiting[: _whole_characters(waiting)].rstrip(b"\r\n"))
            self._is_in_parts = self._is_in_parts or end > 0
        ready = bytes(waiting[:end])
        del waiting[:end]
        self._may_want_lf = not waiting and ready.endswith(b"\r")
        return ready

    def _behind_cr(self, chunk: bytes) -> bytes:
        """Let an LF follow its CR at once: its client may know no other end of an event than CRLF CRLF."""
        self._may_want_lf = False
        if chunk[:1] != b"\n":
            return self.feed(chunk)
        return chunk[:1] + self.feed(chunk[1:])

    def flush(self) -> bytes:
        """Return the part of an event that still waits: the stream has ended, or was cut, inside it."""
        rest = bytes(self._waiting)
        self._waiting.clear()
        return rest


def _last_event_end(data: bytearray, search_from: int) -> int:
    """Return the offset behind the last whole event, 0 if none ends here."""
    last = 0
    for end in _ENDS:
        found = data.rfind(end, search_from)
        if found >= 0:
            last = max(last, found + len(end))
    return last


def _whole_characters(data: bytearray) -> int:
    """Return how many bytes make whole UTF-8 characters; all of them where it is not UTF-8."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if needed > back else len(data)
    return len(data)
