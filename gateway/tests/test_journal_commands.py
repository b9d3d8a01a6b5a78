"""What operators see of the journal: its files, what waits in them, and what a replay records."""

from __future__ import annotations

import datetime as dt
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from billing.models import UsageRecord
from gateway import segments
from gateway.segments import Segment, encode_line
from gateway.tests.journals import dead_file, journal_files
from gateway.tests.test_segments import usage_event
from proxysite import views


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
