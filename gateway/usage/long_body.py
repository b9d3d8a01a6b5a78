"""What can be known of a JSON request that is too long to be held: its two ends, and a guess at its tokens. Pure."""

from __future__ import annotations

from gateway.usage.facts import RequestFacts, facts_of
from gateway.usage.guess import guessed_tokens
from gateway.usage.members import first_members, last_members

_END_BYTES = 64 << 10


class LongBody:
    """Looks at a body part by part, in bounded memory and a millisecond or two for each part."""

    def __init__(self) -> None:
        self.tokens = 0
        self._head = b""
        self._tail = b""

    def feed(self, part: bytes) -> None:
        self.tokens += guessed_tokens(part)
        if len(self._head) < _END_BYTES:
            self._head += _begun(part)
        self._tail = (self._tail + _ended(part))[-_END_BYTES:]

    def facts(self) -> RequestFacts:
        """Return what stands in the outermost object's members at either end; of equal names the last counts."""
        members, _ = first_members(self._head)
        return facts_of(members | last_members(self._tail))


# Without blanks, of which there may be megabytes: they must not be all that the two ends hold.


def _begun(part: bytes) -> bytes:
    size = _END_BYTES
    while len(text := b" ".join(part[:size].split())) < _END_BYTES and size < len(part):
        size *= 4
    return text[:_END_BYTES]


def _ended(part: bytes) -> bytes:
    size = _END_BYTES
    while len(text := b" ".join(part[-size:].split())) < _END_BYTES and size < len(part):
        size *= 4
    return text[-_END_BYTES:]
