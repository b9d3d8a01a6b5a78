"""Usage events: on disk before the client has its last byte, then in the ledger, in batches, each once."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from billing.events import UsageEvent
from gateway import segments
from gateway.backlog import Backlog
from gateway.delivery import ALARM_AFTER_S, Delivery, Sink
from gateway.segments import Segment

logger = logging.getLogger(__name__)

SEGMENT_MAX_BYTES = 64 * 1024 * 1024
_LINES_PER_WRITE = 100


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """What one process's journal holds and did; `alarm` is "" if nothing is wrong.

    `corrupt` lines were damaged on disk. `rejected` events the ledger refuses whatever else works. `lost` ones were
    dropped because neither disk nor ledger took them for too long.
    """

    files: int
    bytes: int
    waiting: int
    oldest_age_s: float
    recorded: int
    duplicates: int
    rejected: int
    corrupt: int
    lost: int
    alarm: str


_running: weakref.WeakSet[Journal] = weakref.WeakSet()


def alarms() -> list[str]:
    """Return what is wrong with the journals that run in this process."""
    return [status.alarm for status in [journal.status() for journal in list(_running)] if status.alarm]


class Journal:
    """The usage events of one process on their way to `sink`, which may fail for as long as it likes.

    An event is appended to a file of this process's own. A thread brings what stands there to the sink and removes
    the file, and does the same for files whose process is dead. While the disk takes nothing, events wait in memory.
    Make it after the fork: the files are locked by the process that opened them.
    """

    def __init__(
        self,
        directory: Path,
        *,
        sink: Sink,
        flush_interval_s: float,
        max_bytes: int,
        max_waiting_events: int = 100_000,
        on_tick: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._delivery = Delivery(sink, clock=clock)
        self._flush_interval_s = flush_interval_s
        self._flush_most_s = flush_interval_s  # then others have their turn: adoption, alarms, `on_tick`
        self._max_bytes = max_bytes
        self._max_waiting_events = max_waiting_events
        self._on_tick = on_tick
        self._clock = clock
        self._host = re.sub(r"[^A-Za-z0-9_]", "-", socket.gethostname())[:64]
        self._nonce = secrets.token_hex(4)
        self._segments_made = 0
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

        # What both threads touch, under the lock, which nobody holds for longer than a write takes.
        self._lock = threading.Lock()
        self._active: Segment | None = None
        self._is_paused = False  # after a failed write, until the next flush
        self._is_closed = False
        self._room_bytes = max_bytes
        self._waiting: deque[bytes] = deque()
        self._in_flight: list[bytes] = []  # of what waited, on the way to the sink
        self._waiting_since = 0.0
        self._lost = 0
        self._disk_error = ""
        self._disk_failed_at = 0.0
        self._is_full = False

        # The flush thread's alone.
        self._backlog = Backlog(directory, delivery=self._delivery, clock=clock, on_error=self._note_disk_error)
        self._reported_alarms: list[str] = []
        self._reported_lost = 0

    # From the event loop

    def start(self) -> None:
        """Open the first file and start the thread. A directory that cannot be used raises an alarm, not an error."""
        self._measure_room()
        self._active = self._new_segment()
        self._thread.start()
        _running.add(self)

    def append(self, event: UsageEvent) -> None:
        """Write the event down, so that it outlives this process; never raises, never waits for the ledger."""
        self.extend([event])

    def extend(self, events: Sequence[UsageEvent]) -> None:
        """Write several events down in one write, on disk or, where they do not fit, in memory; never raises."""
        lines = []
        for event in events:
            try:
                lines.append(segments.encode_line(event))
            except Exception as exc:  # no client's answer may fail for its accounting
                logger.error("a usage event cannot be written down: %s", type(exc).__name__)
                with self._lock:
                    self._lost += 1
        with self._lock:
            if self._is_closed and self._active is None:
                self._active = self._new_segment()
            if lines and not self._write(b"".join(lines)):
                self._keep_waiting(lines)

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush once more, for at most `timeout_s`; what is left stays on disk for whoever adopts it.

        Events that are appended later are written down too.
        """
        _running.discard(self)
        self._flush_most_s = timeout_s
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._lock:
            self._is_closed = True
            self._is_paused = False
            self._keep_waiting(self._in_flight, are_older=True)  # with a sink that does not answer
            if self._waiting and self._active is None:
                self._active = self._new_segment()
        self._write_waiting()
        with self._lock:
            if self._waiting:
                logger.critical("%d usage events end with this process: disk and ledger are away", len(self._waiting))
            if not self._thread.is_alive():
                self._release()

    def _release(self) -> None:
        if self._active is not None:
            self._backlog.add(self._active)
            self._active = None
        self._backlog.release()

    def status(self) -> JournalStatus:
        now = time.time()
        with self._lock:
            held = [segment for segment in (*self._backlog.segments, self._active) if segment is not None]
            waiting = len(self._waiting) + len(self._in_flight)
            since = [segment.first_at for segment in held if segment.size_bytes > segment.offset]
            return JournalStatus(
                files=len(held),
                bytes=sum(segment.size_bytes for segment in held),
                waiting=waiting,
                oldest_age_s=max(0.0, now - min([*since, *([self._waiting_since] if waiting else [])], default=now)),
                recorded=self._delivery.recorded,
                duplicates=self._delivery.duplicates,
                rejected=self._delivery.rejected + self._backlog.set_aside,
                corrupt=self._backlog.corrupt,
                lost=self._lost + self._backlog.lost,
                alarm="; ".join(self._alarms()),
            )

    # Writing, under the lock

    def _write(self, lines: bytes) -> bool:
        if self._active is None or self._is_paused:
            return False
        if len(lines) > self._room_bytes:
            self._is_full = True
            return False
        try:
            self._active.append(lines)
        except OSError as exc:
            self._is_paused = True
            self._note_disk_error(exc)
            return False
        self._room_bytes -= len(lines)
        return True

    def _keep_waiting(self, lines: Sequence[bytes], *, are_older: bool = False) -> None:
        if not self._waiting:
            self._waiting_since = time.time()
        if are_older:
            self._waiting.extendleft(reversed(lines))
        else:
            self._waiting.extend(lines)
        while len(self._waiting) > self._max_waiting_events:
            self._waiting.popleft()
            self._lost += 1

    def _note_disk_error(self, exc: OSError) -> None:
        self._disk_error = exc.strerror or type(exc).__name__
        self._disk_failed_at = self._clock()

    # The flush thread

    def _run(self) -> None:
        tick_at = 0.0
        pause_s = 0.0
        while True:
            is_last = self._is_stopping.wait(pause_s)
            try:
                self.flush(is_last=is_last)
            except Exception:  # whatever it is, the next round may succeed, and nobody else would bring the events
                logger.exception("the journal could not be flushed")
            if is_last:
                return
            now = self._clock()
            if now >= tick_at:
                tick_at = now + self._flush_interval_s
                self._tick()
            has_more = self._backlog.segments and not self._delivery.is_failing
            pause_s = 0.0 if has_more else max(0.0, tick_at - self._clock())

    def _tick(self) -> None:
        if self._on_tick is not None:
            try:
                self._on_tick()
            except Exception:  # others' work must not end ours
                logger.exception("a periodic task failed")

    def flush(self, *, is_last: bool = False) -> None:
        """Bring to the sink what stands in files and memory, for about one flush interval; from one thread at a time.

        With `is_last`, no new file is begun.
        """
        self._backlog.adopt()
        self._rotate(is_last=is_last)
        self._write_waiting()
        self._backlog.record(until=self._clock() + self._flush_most_s)
        self._record_waiting()
        self._measure_room()
        self._report()

    def replay(self) -> JournalStatus:
        """Bring the files of dead processes to the sink, until none is left or it fails; of a journal not started."""
        backlog = self._backlog
        while True:
            backlog.adopt(at_once=True)
            if not backlog.segments:
                break
            while backlog.segments and not self._delivery.is_failing:
                backlog.record(until=self._clock() + self._flush_most_s)
            if self._delivery.is_failing or self._disk_error:
                break
        status = self.status()
        with self._lock:
            self._release()
        return status

    def _rotate(self, *, is_last: bool) -> None:
        """Put the file that is written to behind the backlog, and begin another.

        While the sink fails there is no use in many small files; two let the second tell whether it is only the first
        one's events that fail.
        """
        active = self._active
        if is_last:
            fresh = None
        elif active is None or self._is_due(active):
            fresh = self._new_segment()
            if fresh is None and active is not None and self._delivery.is_failing and not active.is_torn:
                fresh = active  # better than memory
        else:
            fresh = active
        with self._lock:
            self._is_closed = is_last
            self._is_paused = False
            self._active = fresh
            if active is not None and active is not fresh:
                self._backlog.add(active)

    def _is_due(self, active: Segment) -> bool:
        if active.is_torn or not active.is_linked():
            return True
        return bool(active.size_bytes) and (len(self._backlog.segments) < 2 or active.size_bytes > SEGMENT_MAX_BYTES)

    def _new_segment(self) -> Segment | None:
        for _ in range(10):
            path = self._directory / f"{self._host}-{os.getpid()}-{self._nonce}.{self._segments_made}{segments.SUFFIX}"
            self._segments_made += 1
            try:
                return Segment.create(path)
            except (segments.TakenError, FileExistsError):
                continue
            except FileNotFoundError:
                try:
                    self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                except OSError as exc:
                    self._note_disk_error(exc)
                    return None
            except OSError as exc:
                self._note_disk_error(exc)
                return None
        return None

    def _write_waiting(self) -> None:
        """Bring what waits in memory to disk, as far as it takes it."""
        is_written = True
        while is_written:
            with self._lock:
                lines = [self._waiting.popleft() for _ in range(min(_LINES_PER_WRITE, len(self._waiting)))]
                is_written = bool(lines) and self._write(b"".join(lines))
                if lines and not is_written:
                    self._keep_waiting(lines, are_older=True)

    def _record_waiting(self) -> None:
        """Bring to the sink what the disk did not take."""
        until = self._clock() + self._flush_most_s
        while self._waiting and self._clock() < until and self._delivery.is_due:
            with self._lock:
                lines = [self._waiting.popleft() for _ in range(min(self._delivery.batch_events, len(self._waiting)))]
                self._in_flight = lines
            taken = self._delivery.give(b"".join(lines))
            with self._lock:
                self._in_flight = []
                if taken is None:
                    self._keep_waiting(lines, are_older=True)
            if taken is not None:
                self._backlog.put_aside(taken.unreadable)

    # Alarms

    def _measure_room(self) -> None:
        try:
            used_bytes = sum(report.size_bytes for report in segments.survey(self._directory))
        except OSError:
            used_bytes = 0
        with self._lock:
            self._room_bytes = self._max_bytes - used_bytes
            if used_bytes < self._max_bytes * 0.9 and not self._waiting:
                self._is_full = False

    def _alarms(self) -> list[str]:
        """Return what is wrong, in words that stay the same while it lasts."""
        now = self._clock()
        found = []
        if self._disk_error and now - self._disk_failed_at < max(ALARM_AFTER_S, 2 * self._flush_interval_s):
            found.append(f"the journal cannot be written ({self._disk_error})")
        if self._is_full:
            found.append("the journal has reached JOURNAL_MAX_BYTES")
        if alarm := self._delivery.alarm():
            found.append(alarm)
        if len(self._waiting) >= self._max_waiting_events:
            found.append("usage events are dropped")
        return found

    def _report(self) -> None:
        """Log each change once."""
        with self._lock:
            alarms, lost = self._alarms(), self._lost + self._backlog.lost
        for alarm in alarms:
            if alarm not in self._reported_alarms:
                logger.error("%s", alarm)
        if self._reported_alarms and not alarms:
            logger.warning("the journal works again")
        self._reported_alarms = alarms
        if lost > self._reported_lost:
            logger.critical("%d usage events were lost, %d in all", lost - self._reported_lost, lost)
            self._reported_lost = lost
