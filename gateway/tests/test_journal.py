"""Every event appended is in the ledger once, whatever dies, fills up, hangs or is removed on the way."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from pytest_django import Settings

from billing.models import UsageRecord
from gateway import journal as journal_module
from gateway import segments
from gateway.delivery import BATCH_EVENTS
from gateway.journal import Journal
from gateway.segments import Segment, encode_line, read_lines
from gateway.tests.live import ROOT
from gateway.tests.test_delivery import Clock, Outcome
from gateway.tests.test_segments import usage_event
from proxysite import views

MIB = 1024 * 1024
PATIENCE_S = 60.0
# What takes milliseconds by itself; a busy machine's own pace comes on top.
SOON_S = 10.0


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
    return any(str(segment.path) == target.removesuffix(" (deleted)") for segment in journal._backlog)


def ids(numbers: Sequence[int] | range) -> list[str]:
    return [usage_event(number).id for number in numbers]


def journal_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))


def dead_file(directory: Path, numbers: Sequence[int] | range, name: str = "dead.journal") -> Path:
    path = directory / name
    path.write_bytes(b"".join(encode_line(usage_event(number)) for number in numbers))
    return path


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


# The usual way


def test_what_is_appended_is_on_disk_before_append_returns(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger)
    journal.flush()
    for number in range(3):
        journal.append(usage_event(number))
        content = journal_files(tmp_path)[0].read_bytes()
        assert content.endswith(encode_line(usage_event(number)))
    assert ledger.ids == []
    journal.flush()
    assert ledger.ids == ids(range(3))
    assert [path.stat().st_size for path in journal_files(tmp_path)] == [0]


def test_the_thread_brings_events_to_the_ledger_soon(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger, flush_interval_s=0.5)
    journal.start()
    started = time.monotonic()
    journal.append(usage_event(1))
    assert ledger.wait_for(lambda: ledger.ids == ids([1]))
    assert time.monotonic() - started < 0.5 + SOON_S
    journal.close()


def test_closing_flushes_and_leaves_nothing(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger, flush_interval_s=30)
    journal.start()
    assert ledger.wait_for(lambda: True)
    for number in range(1200):
        journal.append(usage_event(number))
    journal.close(timeout_s=PATIENCE_S)
    assert ledger.ids == ids(range(1200))
    assert journal_files(tmp_path) == []


def test_an_event_after_the_end_is_written_down_for_the_next_process(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger)
    journal.start()
    journal.close()
    journal.append(usage_event(1))
    assert len(journal_files(tmp_path)) == 1
    die(journal, tmp_path)
    new_journal(tmp_path, ledger).flush()
    assert ledger.ids == ids([1])


def test_closing_does_not_wait_for_a_ledger_that_hangs(tmp_path: Path, ledger: Ledger) -> None:
    entered, release = threading.Event(), threading.Event()

    def hang(lines: bytes) -> Outcome:
        entered.set()
        release.wait(PATIENCE_S)
        return ledger(lines)

    journal = new_journal(tmp_path, hang)
    journal.start()
    journal.append(usage_event(1))
    assert entered.wait(PATIENCE_S)
    started = time.monotonic()
    journal.close(timeout_s=0.1)
    assert time.monotonic() - started < SOON_S
    release.set()
    assert ledger.wait_for(lambda: ledger.ids == ids([1]))


def test_appending_while_flushing_loses_and_doubles_nothing(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger, flush_interval_s=0.001)
    journal.start()
    threads = [
        threading.Thread(target=lambda first: [journal.append(usage_event(first + n)) for n in range(5000)], args=(k,))
        for k in (0, 5000, 10000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close(timeout_s=PATIENCE_S)
    assert sorted(ledger.ids) == ids(range(15000))
    assert sum(ledger.batches) == 15000
    assert max(ledger.batches) <= BATCH_EVENTS
    assert journal.status().recorded == 15000


def test_on_tick_is_called_and_may_fail(tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    ticks: list[float] = []
    enough = threading.Event()

    def tick() -> None:
        ticks.append(time.monotonic())
        if len(ticks) == 8:
            enough.set()
        raise ValueError("not ours")

    journal = new_journal(tmp_path, ledger, flush_interval_s=0.1, on_tick=tick)
    journal.start()
    assert enough.wait(PATIENCE_S)
    journal.append(usage_event(1))
    assert ledger.wait_for(lambda: ledger.ids == ids([1]))
    journal.close()
    assert ticks[7] - ticks[0] >= 0.35  # half of what it is where nothing holds the first one up
    assert "a periodic task failed" in caplog.text


def test_files_and_directory_are_for_their_owner_only(tmp_path: Path, ledger: Ledger) -> None:
    directory = tmp_path / "deep" / "journal"
    journal = new_journal(directory, ledger)
    journal.start()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in journal_files(directory)] == [0o600]
    journal.close()


def test_nothing_is_appended_by_raising(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger)
    journal.append(usage_event(1, model=object()))
    assert journal.status().lost == 1


# Processes that die

_CHILD = """
import sys
from pathlib import Path
from gateway.journal import Journal
from gateway.tests.test_segments import usage_event
journal = Journal(Path(sys.argv[1]), sink=lambda events: 1 / 0, flush_interval_s=0.05, max_bytes=1 << 20)
journal.start()
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    journal.append(usage_event(number))
print("written", flush=True)
sys.stdin.read()
"""


def _child(directory: Path, first: int, end: int) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(directory), str(first), str(end)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    return child


def test_the_files_of_a_killed_process_are_adopted_and_those_of_a_living_one_are_not(
    tmp_path: Path, ledger: Ledger
) -> None:
    clock = Clock()
    with _child(tmp_path, 0, 700) as doomed, _child(tmp_path, 700, 900) as living:
        journal = new_journal(tmp_path, ledger, clock=clock)
        journal.flush()
        assert ledger.ids == []
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.wait()
        clock.now += journal_module.ADOPTION_INTERVAL_S
        journal.flush()
        assert sorted(ledger.ids) == ids(range(700))
        os.kill(living.pid, signal.SIGKILL)
    clock.now += journal_module.ADOPTION_INTERVAL_S
    journal.flush()
    assert sorted(ledger.ids) == ids(range(900))
    assert [path.stat().st_size for path in journal_files(tmp_path)] == [0]


def test_several_adopters_at_once_record_each_event_once(tmp_path: Path) -> None:
    for number in range(40):
        dead_file(tmp_path, range(number * 10, number * 10 + 10), f"dead-{number}.journal")
    seen: list[str] = []
    start = threading.Barrier(4)

    def sink(lines: bytes) -> Outcome:
        reading = read_lines(lines)
        seen.extend(event.id for event in reading.events)
        return Outcome.of(reading, recorded=len(reading.events))

    def adopt() -> None:
        journal = new_journal(tmp_path, sink)
        start.wait()
        journal.replay()

    adopters = [threading.Thread(target=adopt) for _ in range(4)]
    for adopter in adopters:
        adopter.start()
    for adopter in adopters:
        adopter.join()
    assert sorted(seen) == ids(range(400))
    assert journal_files(tmp_path) == []


@pytest.mark.parametrize("has_recorded", [False, True])
def test_a_process_killed_in_the_middle_of_a_flush_leaves_each_event_once(
    tmp_path: Path, ledger: Ledger, has_recorded: bool
) -> None:
    journal = new_journal(tmp_path, ledger)
    journal.flush()
    for number in range(2 * BATCH_EVENTS):
        journal.append(usage_event(number))
    setattr(ledger, "error_after" if has_recorded else "error", Killed())
    with pytest.raises(Killed):
        journal.flush()
    die(journal, tmp_path)
    ledger.error = ledger.error_after = None
    heir = new_journal(tmp_path, ledger)
    heir.flush()
    assert sorted(ledger.ids) == ids(range(2 * BATCH_EVENTS))
    assert heir.status().duplicates == (BATCH_EVENTS if has_recorded else 0)


def test_a_replay_adds_nothing_twice(tmp_path: Path, ledger: Ledger) -> None:
    for _ in range(2):
        dead_file(tmp_path, range(50))
        status = new_journal(tmp_path, ledger).replay()
    assert ledger.ids == ids(range(50))
    assert (status.recorded, status.duplicates) == (0, 50)


def test_many_small_files_are_taken_without_many_open_ones(tmp_path: Path, ledger: Ledger) -> None:
    for number in range(200):
        dead_file(tmp_path, [number], f"dead-{number:03}.journal")
    ledger.error = ConnectionError()
    journal = new_journal(tmp_path, ledger, clock=(clock := Clock()))
    journal.flush()
    assert journal.status().files < 20
    ledger.error = None
    for _ in range(20):
        clock.now += 1
        journal.flush()
    assert sorted(ledger.ids) == ids(range(200))


# Damage


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path, ledger: Ledger) -> None:
    lines = [encode_line(usage_event(number)) for number in range(5)]
    lines[1] = lines[1].replace(b"gpt", b"gtp")
    lines[3] = b"\n"
    (tmp_path / "dead.journal").write_bytes(b"".join(lines) + b"0123")
    status = new_journal(tmp_path, ledger).replay()
    assert ledger.ids == ids([0, 2, 4])
    assert (status.corrupt, status.rejected, status.lost) == (3, 0, 0)
    assert journal_files(tmp_path) == []


def test_a_line_of_another_version_is_set_aside_and_may_be_tried_again(tmp_path: Path, ledger: Ledger) -> None:
    event = usage_event(1)
    line = encode_line(event)
    foreign = encode_line(usage_event(2, outcome="eaten_by_a_dog"))
    (tmp_path / "dead.journal").write_bytes(foreign + line)
    assert new_journal(tmp_path, ledger).replay().rejected == 1
    assert ledger.ids == [event.id]
    kept = tmp_path / segments.SET_ASIDE_NAME
    assert kept.read_bytes() == foreign
    kept.write_bytes(encode_line(usage_event(2)))
    kept.rename(tmp_path / "again.journal")
    new_journal(tmp_path, ledger).replay()
    assert ledger.ids == ids([1, 2])


@pytest.mark.parametrize("place", [0, 3, 299])
def test_one_event_that_the_ledger_refuses_does_not_hold_up_the_others(
    tmp_path: Path, ledger: Ledger, place: int
) -> None:
    clock = Clock()
    journal = new_journal(tmp_path, ledger, clock=clock)
    journal.flush()
    ledger.refused = set(ids([place]))
    for number in range(300):
        journal.append(usage_event(number))
    for number in range(300, 400):
        journal.append(usage_event(number))
        clock.now += 1
        journal.flush()
    assert sorted(ledger.ids) == ids([number for number in range(400) if number != place])
    assert journal.status().rejected == 1
    assert (tmp_path / segments.SET_ASIDE_NAME).read_bytes() == encode_line(usage_event(place))
    assert journal.status().alarm == ""


# The ledger away


def test_a_ledger_that_was_away_gets_everything_in_order_and_in_batches(
    tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    journal = new_journal(tmp_path, ledger, clock=clock, flush_interval_s=1)
    journal.flush()
    ledger.error = ConnectionError("away")
    for second in range(120):
        for number in range(100):
            journal.append(usage_event(second * 100 + number))
        clock.now += 1
        journal.flush()
        assert len(journal_files(tmp_path)) <= 3
        assert journal.status().waiting == 0
    assert ledger.attempts < 30
    assert "takes no events (ConnectionError)" in journal.status().alarm
    assert caplog.text.count("the ledger takes no events") == 1
    ledger.error = None
    clock.now += 10
    journal.flush()  # what had been closed
    journal.flush()  # what was being written to
    assert ledger.ids == ids(range(12000))
    assert max(ledger.batches) <= BATCH_EVENTS
    assert journal.status().alarm == ""
    assert "works again" in caplog.text


def test_memory_stays_flat_while_the_ledger_is_away(tmp_path: Path) -> None:
    """100,000 events, some 50 MB: neither their outage nor their recovery holds more than a batch."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from gateway.journal import Journal\n"
        "from gateway.tests.test_delivery import Away\n"
        "from gateway.tests.test_segments import usage_event\n"
        "sink = Away()\n"
        "journal = Journal(Path(sys.argv[1]), sink=sink, flush_interval_s=60, max_bytes=1 << 30)\n"
        "journal.flush()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for number in range(100_000):\n"
        "    journal.append(usage_event(number, model='m' * 400))\n"
        "sink.is_away = True\n"
        "journal.flush()\n"
        "sink.is_away = False\n"
        "sink.calls = type('Drop', (), {'append': lambda self, ids: None})()\n"
        "journal._delivery._retry_at = 0.0\n"
        "journal.flush()\n"
        "assert journal.status().recorded == 100_000, journal.status()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024  # KiB


def test_the_thread_goes_on_when_the_ledger_is_back(tmp_path: Path, ledger: Ledger) -> None:
    ledger.error = ConnectionError("away")
    journal = new_journal(tmp_path, ledger)
    journal.start()
    journal.append(usage_event(1))
    assert ledger.wait_for(lambda: ledger.attempts >= 2)
    journal.append(usage_event(2))
    ledger.error = None
    assert ledger.wait_for(lambda: len(ledger.ids) == 2)
    journal.close()
    assert ledger.ids == ids([1, 2])


# The disk full


class FullByLimit:
    """A limit of this process's file sizes: every write beyond fails, part of one succeeds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, but_bytes: int = 0) -> None:
        sizes = [path.stat().st_size for path in journal_files(self.directory)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes, default=0) + but_bytes, self._before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


class FullDisk:
    """A file system of 64 KiB and a file that takes what is left of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, but_bytes: int = 0) -> None:
        with contextlib.suppress(OSError), (self.directory / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(b"x" * 4096)

    def free(self) -> None:
        (self.directory / "ballast").unlink(missing_ok=True)


def mount_tmpfs(directory: Path, *, size: str) -> bool:
    """Return whether a file system of that size was mounted: not everybody may."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


Disk = FullByLimit | FullDisk


@pytest.fixture(params=["limit", "disk"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be full: both kinds where file systems may be mounted, else the limit twice."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if request.param == "disk" and mount_tmpfs(directory, size="64k"):
        yield FullDisk(directory)
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
    else:
        limited = FullByLimit(directory)
        yield limited
        limited.free()


def test_events_wait_in_memory_while_the_disk_is_full_and_go_straight_to_the_ledger(disk: Disk, ledger: Ledger) -> None:
    journal = new_journal(disk.directory, ledger)
    journal.flush()
    journal.append(usage_event(0))
    disk.fill(but_bytes=100)
    for number in range(1, 300):
        journal.append(usage_event(number))
    status = journal.status()
    assert status.waiting > 0
    assert "cannot be written" in status.alarm
    journal.flush()
    disk.free()
    assert sorted(ledger.ids) == ids(range(300))
    assert journal.status().corrupt == journal.status().lost == journal.status().waiting == 0


def test_with_disk_and_ledger_away_events_wait_until_either_is_back(disk: Disk, ledger: Ledger) -> None:
    clock = Clock()
    journal = new_journal(disk.directory, ledger, clock=clock)
    journal.flush()
    ledger.error = ConnectionError("away")
    disk.fill()
    for number in range(200):
        journal.append(usage_event(number))
        if number % 10 == 0:
            clock.now += 1
            journal.flush()
    assert len(journal_files(disk.directory)) <= 3
    assert journal.status().waiting > 0
    disk.free()
    clock.now += 1
    journal.flush()
    assert journal.status().waiting == 0
    assert ledger.ids == []
    die(journal, disk.directory)  # and now they survive
    ledger.error = None
    heir = new_journal(disk.directory, ledger)
    heir.flush()
    assert sorted(ledger.ids) == ids(range(200))
    assert heir.status().corrupt == 0


def test_the_alarm_of_a_full_disk_comes_once_and_goes(
    disk: Disk, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    journal = new_journal(disk.directory, ledger, clock=clock)
    journal.flush()
    disk.fill()
    for number in range(100):
        journal.append(usage_event(number))
        clock.now += 1
        journal.flush()
    disk.free()
    assert caplog.text.count("cannot be written") == 1
    for number in range(100, 120):
        journal.append(usage_event(number))
        clock.now += 1
        journal.flush()
    assert journal.status().alarm == ""
    assert "works again" in caplog.text
    assert sorted(ledger.ids) == ids(range(120))


def test_beyond_the_bound_the_oldest_are_dropped_and_counted(
    tmp_path: Path, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.error = ConnectionError("away")
    (tmp_path / "file").touch()
    journal = new_journal(tmp_path / "file" / "journal", ledger, max_waiting_events=50, clock=(clock := Clock()))
    journal.flush()
    for number in range(80):
        journal.append(usage_event(number))
    clock.now += 1
    journal.flush()
    status = journal.status()
    assert (status.waiting, status.lost) == (50, 30)
    assert "dropped" in status.alarm
    assert [record.levelno for record in caplog.records if "lost" in record.message] == [logging.CRITICAL]
    ledger.error = None
    clock.now += 20
    journal.flush()
    assert ledger.ids == ids(range(30, 80))


def test_closing_with_a_ledger_away_brings_what_waits_to_a_disk_that_is_back(disk: Disk, ledger: Ledger) -> None:
    ledger.error = ConnectionError("away")
    journal = new_journal(disk.directory, ledger)
    journal.start()
    disk.fill()
    for number in range(100):
        journal.append(usage_event(number))
    disk.free()
    journal.close()
    ledger.error = None
    new_journal(disk.directory, ledger).replay()
    assert sorted(ledger.ids) == ids(range(100))


# The directory


def test_a_directory_that_cannot_be_made_stops_nothing(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "file").touch()
    journal = new_journal(tmp_path / "file" / "journal", ledger)
    journal.start()
    journal.append(usage_event(1))
    assert ledger.wait_for(lambda: ledger.ids == ids([1]))
    assert "cannot be written" in journal.status().alarm
    assert journal_module.alarms() == [journal.status().alarm]
    journal.close()
    assert journal_module.alarms() == []


def test_a_directory_removed_under_way_is_made_again(tmp_path: Path, ledger: Ledger) -> None:
    directory = tmp_path / "journal"
    clock = Clock()
    journal = new_journal(directory, ledger, clock=clock)
    journal.flush()
    ledger.error = ConnectionError("away")
    journal.append(usage_event(1))
    for path in journal_files(directory):
        path.unlink()
    directory.rmdir()
    journal.append(usage_event(2))
    clock.now += 1
    journal.flush()
    journal.append(usage_event(3))
    assert len(journal_files(directory)) == 1
    ledger.error = None
    clock.now += 20
    journal.flush()
    assert ledger.ids == ids([1, 2, 3])


def test_a_file_removed_under_way_is_not_written_to_any_longer(tmp_path: Path, ledger: Ledger) -> None:
    journal = new_journal(tmp_path, ledger)
    journal.flush()
    journal_files(tmp_path)[0].unlink()
    journal.flush()
    journal.append(usage_event(1))
    assert [path.read_bytes() for path in journal_files(tmp_path)] == [encode_line(usage_event(1))]


def test_nothing_is_written_behind_half_a_line(tmp_path: Path, ledger: Ledger) -> None:
    clock = Clock()
    journal = new_journal(tmp_path, ledger, clock=clock)
    journal.flush()
    ledger.error = ConnectionError("away")
    for number in range(5):
        journal.append(usage_event(number))
        clock.now += 1
        journal.flush()
    active = journal._active
    assert active is not None
    with active.path.open("ab") as file:
        file.write(b"half a li")
    active.is_torn = True  # as after a disk that took neither the whole line nor the cut
    journal.flush()
    journal.append(usage_event(5))
    ledger.error = None
    for _ in range(2):
        clock.now += 20
        journal.flush()
    assert sorted(ledger.ids) == ids(range(6))
    assert journal.status().corrupt == 1


def test_beyond_the_size_limit_events_wait_in_memory(tmp_path: Path, ledger: Ledger) -> None:
    clock = Clock()
    line_bytes = len(encode_line(usage_event(0)))
    journal = new_journal(tmp_path, ledger, max_bytes=100 * line_bytes, clock=clock)
    journal.flush()
    ledger.error = ConnectionError("away")
    for number in range(300):
        journal.append(usage_event(number))
        if number % 10 == 0:
            clock.now += 1
            journal.flush()
    assert sum(path.stat().st_size for path in journal_files(tmp_path)) <= 100 * line_bytes
    status = journal.status()
    assert status.waiting >= 200
    assert "JOURNAL_MAX_BYTES" in status.alarm
    ledger.error = None
    clock.now += 20
    journal.flush()
    journal.flush()
    assert sorted(ledger.ids) == ids(range(300))
    clock.now += 1
    journal.append(usage_event(300))
    journal.flush()
    assert journal.status().alarm == ""


# Any order of things


class AnyOrder(RuleBasedStateMachine):
    """Two processes append, flush and die in any order, while ledger and disk come and go."""

    @initialize()
    def set_up(self) -> None:
        import tempfile

        self.directory = Path(tempfile.mkdtemp(prefix="journal-"))
        self.ledger = Ledger()
        self.clock = Clock()
        self.appended: list[str] = []
        self.is_disk_full = False
        self.journals = [self._new(), self._new()]

    def _new(self) -> Journal:
        return new_journal(self.directory, self.ledger, clock=self.clock)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        limit = FullByLimit(self.directory)
        if self.is_disk_full:
            limit.fill(but_bytes=70)
        try:
            yield
        finally:
            limit.free()

    @rule(which=st.integers(0, 1), count=st.sampled_from([1, 2, 7, 600]))
    def append(self, which: int, count: int) -> None:
        with self._disk():
            for _ in range(count):
                event = usage_event(len(self.appended))
                self.appended.append(event.id)
                self.journals[which].append(event)

    @rule(which=st.integers(0, 1))
    def flush(self, which: int) -> None:
        with self._disk():
            self.journals[which].flush()

    @rule(which=st.integers(0, 1), has_recorded=st.booleans())
    def die_while_flushing(self, which: int, has_recorded: bool) -> None:
        journal = self.journals[which]
        if journal.status().waiting:
            return  # what is in memory only dies with its process
        before = self.ledger.error
        setattr(self.ledger, "error_after" if has_recorded else "error", Killed())
        with contextlib.suppress(Killed), self._disk():
            journal.flush()
        self.ledger.error, self.ledger.error_after = before, None
        self._bury(which)

    @rule(which=st.integers(0, 1), torn=st.binary(max_size=30))
    def die(self, which: int, torn: bytes) -> None:
        journal = self.journals[which]
        if journal.status().waiting:
            return
        if journal._active is not None and journal._active.is_linked():
            with journal._active.path.open("ab") as file:
                file.write(torn.replace(b"\n", b""))
        self._bury(which)

    @rule(which=st.integers(0, 1))
    def close(self, which: int) -> None:
        if self.is_disk_full and self.ledger.error is not None:
            return
        journal = self.journals[which]
        with self._disk():
            journal.flush(is_last=True)
            journal.close()
        if not journal.status().waiting:
            self.journals[which] = self._new()

    def _bury(self, which: int) -> None:
        die(self.journals[which], self.directory)
        self.journals[which] = self._new()

    @rule(is_away=st.booleans())
    def ledger_comes_or_goes(self, is_away: bool) -> None:
        self.ledger.error = ConnectionError("away") if is_away else None

    @rule(is_full=st.booleans())
    def disk_comes_or_goes(self, is_full: bool) -> None:
        self.is_disk_full = is_full

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    def teardown(self) -> None:
        if not hasattr(self, "journals"):
            return
        self.ledger.error = None
        for _ in range(4):
            self.clock.now += 30
            for journal in self.journals:
                journal.flush()
        for journal in self.journals:
            assert journal.status().lost == 0
            die(journal, self.directory)
        new_journal(self.directory, self.ledger).replay()
        assert sorted(self.ledger.ids) == sorted(self.appended)
        assert not journal_files(self.directory)
        self.directory.rmdir()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=60, stateful_step_count=30, deadline=None)


# Operators


@dataclass
class Command:
    directory: Path

    def __call__(self, action: str) -> str:
        out = io.StringIO()
        call_command("journal", action, stdout=out)
        return out.getvalue()


@pytest.fixture
def command(tmp_path: Path, settings: Settings) -> Command:
    settings.JOURNAL_DIR = tmp_path / "journal"
    return Command(settings.JOURNAL_DIR)


def test_the_status_command_shows_each_file_and_whether_its_owner_lives(command: Command) -> None:
    assert command("status") == "0 files, 0 bytes, 0 events, the oldest for 0 s\n"
    command.directory.mkdir()
    dead_file(command.directory, range(5))
    living = Segment.create(command.directory / "living.journal")
    living.append(encode_line(usage_event(9)))
    segments.set_aside(command.directory, [b"x\n"])
    (command.directory / "no-file.journal").mkdir()
    dead, alive, total, aside = command("status").splitlines()
    assert dead.startswith("dead.journal  owner dead")
    assert "5 events" in dead
    assert alive.startswith("living.journal  owner live")
    assert total.startswith("2 files")
    assert "6 events" in total
    assert aside.startswith("1 events set aside")
    living.close()


@pytest.mark.django_db
def test_the_replay_command_records_what_dead_processes_left(command: Command) -> None:
    command.directory.mkdir()
    now = dt.datetime.now(dt.UTC).timestamp()
    events = [usage_event(number, started_at=now) for number in range(3)]
    path = command.directory / "dead.journal"
    path.write_bytes(b"".join(map(encode_line, events)) + b"half a li")
    living = Segment.create(command.directory / "living.journal")
    living.append(encode_line(usage_event(9)))
    assert command("replay") == "3 recorded, 0 there already, 0 refused, 1 damaged lines\n"
    assert command("replay") == "0 recorded, 0 there already, 0 refused, 0 damaged lines\n"
    assert set(UsageRecord.objects.values_list("event_id", flat=True)) == {event.id for event in events}
    assert journal_files(command.directory) == [living.path]
    living.close()


def test_the_replay_command_fails_while_the_ledger_is_away(command: Command) -> None:
    # Without the django_db mark every access to the database raises: to the journal, a ledger that is away.
    command.directory.mkdir()
    path = dead_file(command.directory, range(3))
    with pytest.raises(CommandError, match="1 files stay"):
        command("replay")
    assert path.exists()
    assert not segments.is_owned(path)


@pytest.mark.django_db
def test_readiness_tells_of_events_that_wait_too_long(command: Command) -> None:
    assert views.readiness()["journal"] == "ok"
    path = dead_file(command.directory, range(3))
    assert views.readiness()["journal"] == "ok"
    written_at = time.time() - 90
    os.utime(path, (written_at, written_at))
    assert views.readiness()["journal"].startswith("events have been waiting for 9")
