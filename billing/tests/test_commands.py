from __future__ import annotations

import datetime as dt
from decimal import Decimal
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from billing import tasks
from billing.models import ApiKey, ModelPrice, Purge, UsageDay, UsageRecord
from billing.progress import ProgressLine
from billing.services import rebuild_usage_days, record_events, reprice
from billing.tests.recorded import day_rows
from billing.tests.samples import NOW, event
from proxysite.celery import app

pytestmark = pytest.mark.django_db
UNTIL = "2026-11-20"


def run(*arguments: str) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def records() -> list[dict[str, Any]]:
    return [{**row, "key_id": None} for row in UsageRecord.objects.order_by("pk").values()]


def test_seeded_usage_is_the_same_for_the_same_arguments() -> None:
    arguments = ("seed_usage", "500", "--keys", "7", "--days", "5", "--until", UNTIL)
    assert run(*arguments).startswith("500 records in ")
    first, days = records(), day_rows()
    assert len(first) == 500
    assert ApiKey.objects.count() == 7
    assert {row["day"] for row in first} == {dt.date(2026, 11, day) for day in range(16, 21)}
    UsageRecord.objects.all()._raw_delete("default")
    UsageDay.objects.all().delete()
    run(*arguments)
    assert records() == first
    assert day_rows() == days


def test_seeded_usage_is_priced_and_summed_like_recorded_usage() -> None:
    run("seed_usage", "400", "--keys", "3", "--days", "3", "--until", UNTIL)
    assert set(UsageRecord.objects.values_list("pricing", flat=True)) == {"priced", "unpriced", "free"}
    before = day_rows()
    assert reprice(dt.datetime(2026, 11, 1, tzinfo=dt.UTC)).changed == 0
    rebuild_usage_days(dt.date(2026, 11, 1), dt.date(2026, 11, 30))
    assert day_rows() == before
    assert UsageDay.objects.exists()


def test_seeding_twice_is_refused() -> None:
    run("seed_usage", "10", "--until", UNTIL)
    with pytest.raises(CommandError, match="already"):
        run("seed_usage", "10", "--until", UNTIL)


@pytest.mark.parametrize("arguments", [["0"], ["1", "--keys", "0"], ["1", "--days", "-1"]])
def test_seeding_nothing_is_refused(arguments: list[str]) -> None:
    with pytest.raises(CommandError):
        run("seed_usage", *arguments)


def test_the_reprice_command_says_what_it_did() -> None:
    record_events([event(model="mine"), event()])
    ModelPrice.objects.create(model="mine", valid_from=NOW, input=Decimal(1), output=Decimal(1))
    assert run("reprice", "--since", UNTIL) == "2 records looked at, 1 rated differently.\n"
    assert run("reprice", "--since", UNTIL, "--model", "mine") == "1 records looked at, 0 rated differently.\n"
    with pytest.raises(CommandError):
        run("reprice")


def test_the_rebuild_command_takes_all_days_there_are() -> None:
    with pytest.raises(CommandError):
        run("rebuild_usage")
    record_events([event(), event(at=NOW + dt.timedelta(days=2))])
    before = day_rows()
    UsageDay.objects.update(requests=9)
    assert run("rebuild_usage") == "3 days rebuilt.\n"
    assert day_rows() == before


def test_the_purge_command_keeps_the_window_of_the_balance() -> None:
    today = timezone.now()
    record_events([event(at=today - dt.timedelta(days=age)) for age in (1, 95, 401)])
    assert run("purge_usage").startswith("1 records")
    assert run("purge_usage", "--before", f"{today - dt.timedelta(days=91):%Y-%m-%d}").startswith("1 records")
    with pytest.raises(CommandError):
        run("purge_usage", "--before", f"{today - dt.timedelta(days=10):%Y-%m-%d}")
    assert UsageRecord.objects.count() == 1


def test_the_purge_task_ends_retention() -> None:
    record_events([event(at=timezone.now() - dt.timedelta(days=age)) for age in (1, 399, 402)])
    assert tasks.purge_usage() == 1
    assert UsageRecord.objects.count() == 2


def test_the_purge_task_comes_again_while_records_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing.retention._RECORDS_PER_CHUNK", 2)
    monkeypatch.setattr("billing.tasks._SLICE_S", 0.0)
    monkeypatch.setattr(app.conf, "task_always_eager", True)
    record_events([event(at=timezone.now() - dt.timedelta(days=500)) for _ in range(5)])
    assert tasks.purge_usage() == 2
    assert not UsageRecord.objects.exists()
    assert [(purge.deleted, purge.finished_at is not None) for purge in Purge.objects.all()] == [(5, True)]


def test_a_progress_line_is_drawn_on_a_terminal_only() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), StringIO()
    for out in (terminal, pipe):
        line = ProgressLine(out, total=4)
        line(1)
        line(3)
        line.close()
    assert pipe.getvalue() == ""
    assert " 25% 1" in terminal.getvalue()
    assert terminal.getvalue().endswith("100% 4\n")
