"""What the sandbox remembers: bounded, in memory, shared by everyone who uses it, gone with the process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from gateway.sandbox.wire import Json

T = TypeVar("T")
MIB = 1024 * 1024
# What an error says of something that is not here: another worker may have it.
KEPT_BY_WORKER = "The sandbox keeps each in the memory of one worker."


class Shelf(Generic[T]):
    """Things by id, oldest first. What is too much pushes out the oldest."""

    def __init__(self, *, most_things: int, most_bytes: int) -> None:
        self._most_things = most_things
        self._most_bytes = most_bytes
        self._bytes = 0
        self._things: OrderedDict[str, tuple[T, int]] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        return (thing for thing, _ in self._things.values())

    def __len__(self) -> int:
        return len(self._things)

    def put(self, key: str, thing: T, *, size_bytes: int) -> bool:
        """Keep it, as the newest; False, with nothing changed, when it alone is larger than the shelf."""
        if size_bytes > self._most_bytes:
            return False
        self.take(key)
        self._things[key] = (thing, size_bytes)
        self._bytes += size_bytes
        while self._bytes > self._most_bytes or len(self._things) > self._most_things:
            self.take(next(iter(self._things)))
        return True

    def get(self, key: str) -> T | None:
        found = self._things.get(key)
        return found[0] if found else None

    def take(self, key: str) -> T | None:
        found = self._things.pop(key, None)
        if found is None:
            return None
        self._bytes -= found[1]
        return found[0]


@dataclass(frozen=True, slots=True)
class StoredFile:
    about: Json  # OpenAI's file object
    content: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: Json
    input_items: list[Any]


def _files() -> Shelf[StoredFile]:
    return Shelf(most_things=64, most_bytes=16 * MIB)


def _responses() -> Shelf[StoredResponse]:
    return Shelf(most_things=256, most_bytes=8 * MIB)


@dataclass(slots=True)
class Stock:
    """Everything that outlives a request."""

    files: Shelf[StoredFile] = field(default_factory=_files)
    responses: Shelf[StoredResponse] = field(default_factory=_responses)
