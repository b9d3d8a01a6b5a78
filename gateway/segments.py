"""The files of the journal: each written by one process, and read back by whoever holds its lock."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec

from billing.events import UsageEvent
from billing.rows import event_in, events_in

SUFFIX = ".journal"
# Lines that are whole and yet cannot be recorded wait here for an operator; as `anything.journal` they are tried again.
SET_ASIDE_NAME = "set-aside.lines"
LINE_MAX_BYTES = 64 * 1024
_READ_BYTES = 1024 * 1024
_CHECKSUM_BYTES = 8
_TEXT_MAX_CHARS = 1000

_encoder = msgspec.json.Encoder()


# Lines


def encode_line(event: UsageEvent) -> bytes:
    """Return the event as one line: CRC-32 in hex, a blank, JSON. Raises for an event that is no JSON at all."""
    try:
        text = _encoder.encode(event)
    except UnicodeEncodeError:
        text = _encoder.encode(_repaired(event))
    if len(text) > LINE_MAX_BYTES - _CHECKSUM_BYTES - 2:
        text = _encoder.encode(_repaired(event))
    return b"%08x %b\n" % (zlib.crc32(text), text)


def text_of(line: bytes) -> bytes | None:
    """Return what a line, without its end, says; None if it is not what was once appended."""
    text = line[_CHECKSUM_BYTES + 1 :]
    return text if line.startswith(b"%08x " % zlib.crc32(text)) else None


def is_whole(line: bytes) -> bool:
    """Return whether a line, without its end, is what was once appended."""
    return text_of(line) is not None


def decode_line(line: bytes) -> UsageEvent | None:
    """Return the event of a whole line, None if this version cannot read it."""
    return event_in(line[_CHECKSUM_BYTES + 1 :])


@dataclass(frozen=True, slots=True)
class Reading:
    """What lines say: events, whole lines with their ends that this version cannot read, and how many were damaged."""

    events: list[UsageEvent]
    unreadable: list[bytes]
    corrupt: int


def read_lines(lines: bytes) -> Reading:
    """Return the events of lines as they stand in a file."""
    found = list(io.BytesIO(lines))
    texts = [line[_CHECKSUM_BYTES + 1 : -1] for line in found]
    # Nearly always all are whole: one comparison tells.
    checksums = b"%08x " * len(texts) % tuple(map(zlib.crc32, texts))
    corrupt = 0
    if b"".join([line[: _CHECKSUM_BYTES + 1] for line in found]) != checksums:
        whole = [line for line in found if is_whole(line[:-1])]
        corrupt = len(found) - len(whole)
        found, texts = whole, [line[_CHECKSUM_BYTES + 1 : -1] for line in whole]
    events = events_in(texts)
    unreadable = [line for line, event in zip(found, events, strict=True) if event is None]
    return Reading([event for event in events if event is not None], unreadable, corrupt)


def first_lines(lines: bytes, most: int) -> bytes:
    """Return at most so many of the lines, each with its end."""
    # A file in memory finds the ends of lines at a fifth of what split() takes.
    return lines[: sum(map(len, islice(io.BytesIO(lines), most)))]


def first_readable(lines: bytes) -> bytes:
    """Return the first line that holds an event, b"" if there is none."""
    found = io.BytesIO(lines)
    return next((line for line in found if is_whole(line[:-1]) and decode_line(line[:-1]) is not None), b"")


def _repaired(event: UsageEvent) -> UsageEvent:
    """Return the event with lone surrogates, which no encoding takes, replaced and long texts cut."""
    values = ((name, getattr(event, name)) for name in UsageEvent.__struct_fields__)
    texts = {
        name: value[:_TEXT_MAX_CHARS].encode("utf-8", "replace").decode()
        for name, value in values
        if isinstance(value, str)
    }
    return msgspec.structs.replace(event, **texts)


# Segments


class TakenError(OSError):
    """Somebody else took the file between its creation and our lock."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What stands in a file: lines with their ends as they are, or what can be no line; and where the next begins."""

    lines: bytes
    corrupt: int
    next_offset: int


class Segment:
    """One file of lines, locked for as long as it is held; the system drops the lock with the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        status = os.fstat(descriptor)
        self.size_bytes = status.st_size
        self.first_at = status.st_mtime  # seconds since the epoch, of what waits longest (if adopted: at most)
        self.offset = 0  # up to here everything is recorded
        self.is_torn = False
        self._descriptor = descriptor
        self._inode = (status.st_dev, status.st_ino)

    @classmethod
    def create(cls, path: Path) -> Segment:
        """Make a new, empty one that is ours. Raises OSError; TakenError if an adopter was quicker."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        return cls._locked(path, descriptor)

    @classmethod
    def adopt(cls, path: Path) -> Segment:
        """Take over one whose owner is dead. Raises OSError, TakenError if its owner lives or it was just removed."""
        return cls._locked(path, os.open(path, os.O_RDWR | os.O_APPEND))

    @classmethod
    def _locked(cls, path: Path, descriptor: int) -> Segment:
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise TakenError(f"{path.name} is locked") from exc
            segment = cls(path, descriptor)
            # Who held the lock before us may have recorded and removed the file: then we hold what nobody sees.
            if not segment.is_linked():
                raise TakenError(f"{path.name} was removed")
        except BaseException:
            os.close(descriptor)
            raise
        return segment

    def append(self, line: bytes) -> None:
        """Write whole lines, or nothing: raises OSError, the file cut back to its last whole line.

        Where even that fails the file is torn: it ends in a part of a line, and nothing may follow.
        """
        if not self.size_bytes:
            self.first_at = time.time()
        written = 0
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):  # a full disk first takes a part, and says why when asked again
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if written:
                self._cut_back()
            raise
        self.size_bytes += written

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self.size_bytes)
        except OSError:
            self.is_torn = True

    def read(self, most_lines: int, *, offset: int) -> Batch | None:
        """Return the lines that begin at an offset, at most so many; None at the end. Raises OSError.

        Nobody has looked into them yet: see `read_lines`.
        """
        block = os.pread(self._descriptor, _READ_BYTES, offset)
        if not block:
            return None
        end = block.rfind(b"\n") + 1
        if not end:  # the last line was never finished, or what stands here is no line at all
            return Batch(b"", 1, offset + len(block))
        lines = first_lines(block[:end], most_lines)
        return Batch(lines, 0, offset + len(lines))

    def is_linked(self) -> bool:
        """Return whether the file is still there under its name."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._inode

    def remove(self) -> None:
        """Remove the file, whose content is recorded, and let go of it."""
        try:
            if self.is_linked():
                os.unlink(self.path)
        except OSError:
            # Nobody shall read all of it again.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file, for whoever adopts it."""
        os.close(self._descriptor)


# The directory


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """A file as anybody finds it; `written_at` in seconds since the epoch."""

    path: Path
    size_bytes: int
    written_at: float


def survey(directory: Path) -> list[SegmentReport]:
    """Return the segments of all processes, by name. Raises OSError if the directory cannot be read."""
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if not stat.S_ISREG(status.st_mode):
                        continue
                    found.append(SegmentReport(Path(entry.path), status.st_size, status.st_mtime))
    return sorted(found, key=lambda report: report.path.name)


def oldest_age_s(reports: Iterable[SegmentReport], *, now: float) -> float:
    """Return for how long, at the least, something has been waiting; 0 if nothing waits."""
    return max((now - report.written_at for report in reports if report.size_bytes), default=0.0)


def is_owned(path: Path) -> bool:
    """Return whether a living process holds the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look do not take each other for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def count_lines(path: Path) -> int:
    """Return how many lines a file holds, 0 if it is gone."""
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(partial(file.read, _READ_BYTES), b""))
    except FileNotFoundError:
        return 0


def set_aside(directory: Path, lines: Iterable[bytes]) -> None:
    """Keep lines for an operator, all of them or none. Raises OSError."""
    descriptor = os.open(directory / SET_ASIDE_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # of all workers one writes, or cuts back
        before_bytes = os.fstat(descriptor).st_size
        left = memoryview(b"".join(lines))
        try:
            while left:  # a full disk first takes a part, and says why when asked again
                left = left[os.write(descriptor, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before_bytes)
            raise
    finally:
        os.close(descriptor)
