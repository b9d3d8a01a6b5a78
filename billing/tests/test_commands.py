from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone
from pytest_django import Settings

from billing import tasks
from billing.events import Usage
from billing.models import ApiKey, ModelPrice, PriceSource, UsageDay, UsageRecord
from billing.progress import ProgressLine
from billing.services import rebuild_usage_days, record_events, refresh_prices, reprice
from billing.tests.samples import NOW, event
from billing.tests.test_list_prices import price_server as price_server
from billing.tests.test_list_prices import published
from billing.tests.test_recording import day_rows

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


# List prices


def test_prices_are_not_refreshed_unless_the_operator_wants_it(settings: Settings) -> None:
    assert settings.REFRESH_LIST_PRICES is False
    assert tasks.refresh_prices() == 0


def test_a_refreshed_list_counts_from_its_day_on_and_after_what_operators_entered(
    price_server: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}, "gpt-7": {"input_mtok": "3"}})
    price_server.body = json.dumps(rows).encode()
    ModelPrice.objects.create(model="gpt-7", valid_from=NOW - dt.timedelta(days=9), input=Decimal(50))
    assert refresh_prices(now=NOW, url=price_server.url) > 1
    assert refresh_prices(now=NOW + dt.timedelta(days=1), url=price_server.url) == 0
    assert ModelPrice.objects.get(model="gpt-4o", source=PriceSource.REFRESHED).output == 9
    # As any other process is: it knows the shipped list and the database.
    monkeypatch.setattr("billing.list_prices._fetched", None)
    usage = Usage(input_tokens=1_000_000)
    days = (NOW - dt.timedelta(days=1), NOW)
    record_events([event(model=model, at=at, usage=usage) for model in ("gpt-4o-2024-08-06", "gpt-7") for at in days])
    found = UsageRecord.objects.order_by("model", "started_at").values_list("cost_usd", "price_source")
    assert list(found) == [(Decimal("2.5"), "list"), (2, "refreshed"), (50, "own"), (50, "own")]


def test_a_price_that_goes_back_to_the_shipped_one_is_written_down_too(price_server: Any) -> None:
    for day, rate in enumerate(("2", "2.5")):
        price_server.body = json.dumps(published(**{"gpt-4o": {"input_mtok": rate, "output_mtok": "10"}})).encode()
        refresh_prices(now=NOW + dt.timedelta(days=day), url=price_server.url)
    rows = ModelPrice.objects.filter(model="gpt-4o").order_by("valid_from")
    assert [row.input for row in rows] == [Decimal(2), Decimal("2.5")]


def test_a_list_that_cannot_be_fetched_changes_nothing() -> None:
    assert refresh_prices(now=NOW, url="http://127.0.0.1:9/", timeout_s=1) == 0
    assert not ModelPrice.objects.exists()
