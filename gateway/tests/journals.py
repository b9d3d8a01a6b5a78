"""Journals on a ledger in memory, the files that they leave, and the death of their process."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.journal import Journal
from gateway.segments import encode_line, read_lines
from gateway.tests.test_delivery import Outcome
from gateway.tests.test_segments import usage_event

MIB = 1024 * 1024
PATIENCE_S = 60.0


class Ledger:
    """A ledger in memory: each event once; fails with `error` while there is one."""

    def __init__(self) -> None:
        self.ids: list[str] = []  # in the order in which they came
        self._known: set[str] = set()
        self.batches: list[int] = []
        self.error: BaseException | None = None
        self.error_after: BaseException | None = None  # once it has recorded
        self.refused: set[str] = set()
        self.attempts = 0
        self._changed = threading.Condition()

    def __call__(self, lines: bytes) -> Outcome:
        reading = read_lines(lines)
        events = reading.events
        with self._changed:
            self.attempts += 1
            self._changed.notify_all()
            if self.error is not None:
                raise self.error
            if self.refused & {event.id for event in events}:
                raise ValueError("not this one")
            new = [event.id for event in events if event.id not in self._known]
            self.ids += new
            self._known.update(new)
            self.batches.append(len(events))
            if self.error_after is not None:
                raise self.error_after
            return Outcome.of(reading, recorded=len(new))

    def wait_for(self, is_so: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(is_so, PATIENCE_S)


class Killed(BaseException):
    """The end of a process in the middle of a flush."""


def new_journal(directory: Path, ledger: Callable[[bytes], Any], **options: Any) -> Journal:
    options = {"flush_interval_s": 0.05, "max_bytes": 64 * MIB, **options}
    return Journal(directory, sink=ledger, **options)


def die(journal: Journal, directory: Path) -> None:
    """Do to its files what the system does when a process ends."""
    nonce = journal._nonce
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(str(directory)) and (nonce in target or _is_adopted(journal, target)):
                os.close(int(name))


def _is_adopted(journal: Journal, target: str) -> bool:
    return any(str(segment.path) == target.removesuffix(" (deleted)") for segment in journal._backlog.segments)


def ids(numbers: Sequence[int] | range) -> list[str]:
    return [usage_event(number).id for number in numbers]


def journal_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))


def dead_file(directory: Path, numbers: Sequence[int] | range, name: str = "dead.journal") -> Path:
    path = directory / name
    path.write_bytes(b"".join(encode_line(usage_event(number)) for number in numbers))
    return path
