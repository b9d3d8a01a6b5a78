"""The numbers of all workers of an instance, passed through files: each worker writes its own, anybody sums them up.

A worker holds a lock on its file for as long as it lives. What dead ones have counted is kept in one file, so that no
sum ever goes back.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gateway.tally import Key

logger = logging.getLogger(__name__)

_SUFFIX = ".snapshot"
_LEGACY_NAME = "dead.total"
_LOCK_NAME = "lock"


class Snapshot(msgspec.Struct):
    """Numbers under a metric's name and its labels' values. Counters and histograms outlive their worker."""

    counters: dict[Key, float] = {}
    histograms: dict[Key, list[float]] = {}
    gauges: dict[Key, float] = {}

    def add(self, other: Snapshot, *, with_gauges: bool) -> None:
        """Add what another has counted; a histogram of other buckets, of another release, starts anew."""
        for key, value in other.counters.items():
            self.counters[key] = self.counters.get(key, 0) + value
        for key, values in other.histograms.items():
            ours = self.histograms.get(key, [])
            same = len(ours) == len(values)
            self.histograms[key] = [a + b for a, b in zip(ours, values, strict=True)] if same else list(values)
        for key, value in other.gauges.items() if with_gauges else ():
            self.gauges[key] = self.gauges.get(key, 0) + value


class _Legacy(msgspec.Struct):
    """What the dead have counted; `included` names files that count no more, even if one is still there."""

    total: Snapshot
    included: list[str] = []


_encode = msgspec.msgpack.Encoder().encode
_snapshot_in = msgspec.msgpack.Decoder(Snapshot).decode
_legacy_in = msgspec.msgpack.Decoder(_Legacy).decode


class SnapshotFile:
    """One worker's file, replaced as a whole at each `write`."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}"
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def write(self, snapshot: Snapshot) -> None:
        """Write the numbers down. Raises OSError; what was written before is then still there."""
        content = _encode(snapshot)
        with self._lock:
            aside = self._path.with_suffix(".new")
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(content)
                os.replace(aside, self._path)
            except BaseException:
                os.close(descriptor)
                raise
            before, self._descriptor = self._descriptor, descriptor
            if before is not None:
                os.close(before)

    def close(self) -> None:
        """Leave the file to whoever sums up next."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def summed_up(directory: Path) -> Snapshot:
    """Return the sum of all workers, dead ones included, whose files are removed. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone_in(directory):
        legacy = _read_legacy(directory)
        total = Snapshot()
        total.add(legacy.total, with_gauges=False)
        dead = []
        for path in sorted(directory.glob(f"*{_SUFFIX}")):
            if path.name in legacy.included:
                path.unlink(missing_ok=True)
                continue
            content, is_dead = _read(path)
            snapshot = _decoded(content, path)
            total.add(snapshot, with_gauges=not is_dead)
            if is_dead:
                dead.append(path)
                legacy.total.add(snapshot, with_gauges=False)
        if dead:
            _bury(directory, legacy, dead)
        return total


def _bury(directory: Path, legacy: _Legacy, dead: list[Path]) -> None:
    """Keep what the dead have counted, then remove their files: whatever happens in between, nothing counts twice."""
    legacy.included = [path.name for path in dead]
    aside = directory / f"{_LEGACY_NAME}.new"
    aside.write_bytes(_encode(legacy))
    os.replace(aside, directory / _LEGACY_NAME)
    for path in dead:
        path.unlink(missing_ok=True)
        path.with_suffix(".new").unlink(missing_ok=True)


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_legacy(directory: Path) -> _Legacy:
    path = directory / _LEGACY_NAME
    try:
        return _legacy_in(path.read_bytes())
    except FileNotFoundError:
        return _Legacy(Snapshot())
    except msgspec.MsgspecError:
        logger.warning("%s cannot be read: counters begin anew", path.name)
        return _Legacy(Snapshot())


def _read(path: Path) -> tuple[bytes, bool]:
    """Return a file's content, and whether its worker is dead."""
    while True:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(), False
            # A living worker may have replaced the file just now, and let go of this one.
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file.read(), True


def _decoded(content: bytes, path: Path) -> Snapshot:
    try:
        return _snapshot_in(content)
    except msgspec.MsgspecError:
        logger.warning("%s cannot be read", path.name)
        return Snapshot()
