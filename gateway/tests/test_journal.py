"""Every event appended is in the ledger once, though lines are damaged and the ledger is away or refuses one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gateway import segments
from gateway.delivery import BATCH_EVENTS
from gateway.segments import encode_line
from gateway.tests.journals import PATIENCE_S, Ledger, die, ids, journal_files, new_journal
from gateway.tests.live import ROOT
from gateway.tests.test_delivery import Clock, Outcome
from gateway.tests.test_segments import usage_event

# What takes milliseconds by itself; a busy machine's own pace comes on top.
SOON_S = 10.0


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


def test_of_several_events_one_that_cannot_be_written_down_keeps_none_of_the_others(
    tmp_path: Path, ledger: Ledger
) -> None:
    journal = new_journal(tmp_path, ledger)
    journal.start()
    journal.extend([usage_event(1), usage_event(2, model=object()), usage_event(3)])
    journal.close()
    assert ledger.ids == ids([1, 3])
    assert journal.status().lost == 1


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
