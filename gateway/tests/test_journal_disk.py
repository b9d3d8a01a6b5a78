"""A journal whose disk is full, or whose directory is not there, loses nothing that memory can hold."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import journal as journal_module
from gateway import segments
from gateway.segments import encode_line
from gateway.tests.full_disks import Disk, FullByLimit, FullDisk, mount_tmpfs
from gateway.tests.journals import Ledger, die, ids, journal_files, new_journal
from gateway.tests.test_delivery import Clock
from gateway.tests.test_segments import usage_event


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


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


def test_what_a_disk_that_fills_up_does_not_take_is_not_set_aside_in_part(disk: Disk) -> None:
    lines = [b"%08d\n" % number for number in range(2000)]
    segments.set_aside(disk.directory, lines[:10])
    disk.fill(but_bytes=1000)
    with pytest.raises(OSError, match=r"No space left|File too large"):
        segments.set_aside(disk.directory, lines)
    disk.free()
    segments.set_aside(disk.directory, lines[-1:])
    assert (disk.directory / segments.SET_ASIDE_NAME).read_bytes() == b"".join([*lines[:10], lines[-1]])


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
