"""Every event appended is in the ledger once, whichever process dies on the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from gateway.backlog import ADOPTION_INTERVAL_S
from gateway.delivery import BATCH_EVENTS
from gateway.journal import Journal
from gateway.segments import read_lines
from gateway.tests.full_disks import FullByLimit
from gateway.tests.journals import Killed, Ledger, dead_file, die, ids, journal_files, new_journal
from gateway.tests.live import ROOT
from gateway.tests.test_delivery import Clock, Outcome
from gateway.tests.test_segments import usage_event


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


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
        clock.now += ADOPTION_INTERVAL_S
        journal.flush()
        assert sorted(ledger.ids) == ids(range(700))
        os.kill(living.pid, signal.SIGKILL)
    clock.now += ADOPTION_INTERVAL_S
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
