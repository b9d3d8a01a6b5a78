"""What one worker knows of the counts in Redis, to be told again to one that has lost its memory."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gateway.limits import Ask

# Addresses are clients' to make up; whoever was heard of last is kept.
_MOST_NAMES = 50_000
_AT_ONCE = 200


@dataclass(slots=True)
class Held:
    """What a request in progress has taken, and `units` that it has reserved in all: changed by one at a time."""

    asks: Sequence[Ask]
    units: int
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Witness:
    """`held` is what is in progress, by request."""

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self._spent: dict[str, tuple[str, int]] = {}

    def hear(self, asks: Sequence[Ask], spent: Sequence[int], *, month: str) -> None:
        """Take note of what Redis says that each of these has spent, all workers together."""
        for ask, units in zip(asks, spent, strict=False):
            if units and ask.limits.monthly_units:
                self._spent.pop(ask.name, None)
                self._spent[ask.name] = month, units
        while len(self._spent) > _MOST_NAMES:
            del self._spent[next(iter(self._spent))]

    def spent(self) -> Iterator[list[tuple[str, str, int]]]:
        """Yield name, month and units of whoever has spent something, a few at a time."""
        found = [(name, month, units) for name, (month, units) in self._spent.items()]
        for start in range(0, len(found), _AT_ONCE):
            yield found[start : start + _AT_ONCE]

    def leases(self) -> Iterator[tuple[Ask, list[tuple[str, int]]]]:
        """Yield the requests in progress of each key or address, and what they have reserved, a few at a time."""
        by_name: defaultdict[str, list[tuple[Ask, str, int]]] = defaultdict(list)
        for request_id, held in self.held.items():
            for ask in held.asks:
                if is_leased(ask):
                    by_name[ask.name].append((ask, request_id, held.units if ask.limits.monthly_units else 0))
        for found in by_name.values():
            for start in range(0, len(found), _AT_ONCE):
                # What has ended meanwhile must not come back.
                part = [entry for entry in found[start : start + _AT_ONCE] if entry[1] in self.held]
                if part:
                    yield part[0][0], [(request_id, units) for _, request_id, units in part]


def is_leased(ask: Ask) -> bool:
    """Return whether Redis knows a request by its name, until it ends."""
    return bool(ask.limits.concurrent_streams or ask.limits.monthly_units)
