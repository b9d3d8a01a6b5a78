"""Newer list prices: every process sees the same, what was before keeps its price, and nonsense does no harm."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from collections.abc import Iterator
from decimal import Decimal
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from billing import tasks
from billing.events import Usage
from billing.list_prices import all_list_prices, list_price
from billing.models import ModelPrice, PriceSource, UsageRecord
from billing.price_refresh import LIST_MAX_BYTES, RefreshError, refresh_prices
from billing.services import record_events
from billing.tests.price_server import PriceServer, published, published_by
from billing.tests.samples import NOW, event

pytestmark = pytest.mark.django_db
DAY = dt.timedelta(days=1)
NOWHERE = "http://127.0.0.1:9/"


@pytest.fixture
def price_server() -> Iterator[PriceServer]:
    with PriceServer() as server:
        yield server


def rated(model: str, at: dt.datetime) -> tuple[Decimal | None, str]:
    """Return what a million tokens cost at that time, and whose price that is, as any process rates them."""
    happened = event(model=model, at=at, usage=Usage(input_tokens=1_000_000))
    record_events([happened])
    record = UsageRecord.objects.get(pk=happened.id)
    return record.cost_usd, record.price_source


def settle(price_server: PriceServer) -> None:
    """Have the published list in force: it is without the shipped one's batch prices and tiers."""
    price_server.publish(published())
    refresh_prices(now=NOW, url=price_server.url)


def test_a_refreshed_list_counts_from_its_day_on_and_after_what_operators_entered(price_server: PriceServer) -> None:
    price_server.publish(published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}, "gpt-7": {"input_mtok": "3"}}))
    ModelPrice.objects.create(model="gpt-7", valid_from=NOW - 9 * DAY, input=Decimal(50))
    assert refresh_prices(now=NOW, url=price_server.url) > 1
    assert ModelPrice.objects.get(model="gpt-4o", source=PriceSource.REFRESHED).output == 9
    assert rated("gpt-4o-2024-08-06", NOW - DAY) == (Decimal("2.5"), "list")
    assert rated("gpt-4o-2024-08-06", NOW) == (2, "refreshed")
    assert rated("gpt-7", NOW - DAY) == (50, "own")
    assert rated("gpt-7", NOW) == (50, "own")


def test_a_refresh_changes_no_list_in_this_process(price_server: PriceServer) -> None:
    before = list(all_list_prices(NOW))
    price_server.publish(published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}}))
    refresh_prices(now=NOW, url=price_server.url)
    assert list(all_list_prices(NOW)) == before


def test_a_list_without_news_writes_nothing(price_server: PriceServer) -> None:
    price_server.publish(published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}}))
    refresh_prices(now=NOW, url=price_server.url)
    rows = ModelPrice.objects.count()
    assert refresh_prices(now=NOW + DAY, url=price_server.url) == 0
    assert ModelPrice.objects.count() == rows


def test_a_price_that_goes_back_to_the_shipped_one_is_written_down_too(price_server: PriceServer) -> None:
    for day, rate in enumerate(("2", "2.5")):
        price_server.publish(published(**{"gpt-4o": {"input_mtok": rate, "output_mtok": "10"}}))
        refresh_prices(now=NOW + day * DAY, url=price_server.url)
    rows = ModelPrice.objects.filter(model="gpt-4o").order_by("valid_from")
    assert [row.input for row in rows] == [Decimal(2), Decimal("2.5")]
    assert rated("gpt-4o", NOW) == (2, "refreshed")
    assert rated("gpt-4o", NOW + DAY) == (Decimal("2.5"), "refreshed")


def test_a_name_that_leads_to_a_row_gets_the_rows_new_price(price_server: PriceServer) -> None:
    listed = list_price("grok-4", NOW)
    assert listed is not None
    assert listed.row == "x-ai/grok-4-0709"  # another name than the one that is asked for
    price_server.publish(published_by(x_ai={"grok-4-0709": {"input_mtok": "4", "output_mtok": "20"}}))
    refresh_prices(now=NOW, url=price_server.url)
    for name in ("grok-4", "x-ai/grok-4", "grok-4-0709"):
        assert rated(name, NOW) == (4, "refreshed")


def test_a_providers_price_is_not_another_providers(price_server: PriceServer) -> None:
    price_server.publish(published_by(deepseek={"gpt-4o": {"input_mtok": "7", "output_mtok": "9"}}))
    refresh_prices(now=NOW, url=price_server.url)
    assert ModelPrice.objects.filter(model="deepseek/gpt-4o").exists()
    assert rated("gpt-4o", NOW)[0] == Decimal("2.5")


def test_a_snapshot_with_a_row_of_its_own_does_not_take_the_familys_new_price(price_server: PriceServer) -> None:
    name = "gpt-4o-audio-preview-2024-10-01"
    before = rated(name, NOW)
    price_server.publish(published(**{"gpt-4o-audio-preview": {"input_mtok": "9", "output_mtok": "20"}}))
    refresh_prices(now=NOW, url=price_server.url)
    assert rated("gpt-4o-audio-preview", NOW) == (9, "refreshed")
    assert rated(name, NOW) == before


def test_a_new_model_is_found_by_the_names_that_lead_to_it(price_server: PriceServer) -> None:
    price_server.publish(published_by(openai={"gpt-7": {"input_mtok": "3"}}, x_ai={"grok-9": {"input_mtok": "6"}}))
    refresh_prices(now=NOW, url=price_server.url)
    for name in ("gpt-7", "openai/gpt-7", "gpt-7-2027-01-31"):
        assert rated(name, NOW) == (3, "refreshed")
    assert rated("grok-9", NOW) == (6, "refreshed")
    assert rated("gpt-7-mini", NOW) == (None, "")


def test_prices_that_change_with_the_hour_stay_those_of_the_package(price_server: PriceServer) -> None:
    hourly = {listed.row for listed in all_list_prices(NOW) if listed.is_hourly}
    assert "deepseek/deepseek-chat" in hourly
    known = next(price for price in published_by(deepseek={}) if price["id"] == "deepseek")
    night = {"constraint": {"start_time": "01:00:00Z", "end_time": "02:00:00Z", "type": "time_of_date"}}
    for model in known["models"]:
        if f"deepseek/{model['id']}" in hourly:
            model["prices"] = [{"prices": {"input_mtok": "0.3"}}, {**night, "prices": {"input_mtok": "0.2"}}]
    price_server.publish([*published(), known])
    refresh_prices(now=NOW, url=price_server.url)
    assert not ModelPrice.objects.filter(model__in=hourly).exists()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>blocked</html>", "JSONDecodeError"),
        (b"{}", "ValueError"),
        (b"[]", "models of OpenAI are left"),
        (b'[{"id": "openai"}]', "ValidationError"),
        (
            json.dumps(published(**{"gpt-4o": {"input_mtok": "0.001", "output_mtok": "10"}})).encode(),
            "openai/gpt-4o went",
        ),
        (json.dumps(published(**{"gpt-4o": {"input_mtok": "0", "output_mtok": "10"}})).encode(), "openai/gpt-4o went"),
        (json.dumps(published(**{"gpt-4o": {"input_mtok": "-1", "output_mtok": "10"}})).encode(), "ValueError"),
        (json.dumps(published(**{"gpt-4o": {"input_mtok": "NaN", "output_mtok": "10"}})).encode(), "."),
    ],
)
def test_what_makes_no_sense_is_not_used(price_server: PriceServer, body: bytes, problem: str) -> None:
    price_server.body = body
    with pytest.raises(RefreshError, match=problem):
        refresh_prices(now=NOW, url=price_server.url)
    assert not ModelPrice.objects.exists()


def test_a_list_without_end_is_given_up(price_server: PriceServer) -> None:
    price_server.body = b"[" + b" " * 2 * LIST_MAX_BYTES
    with pytest.raises(RefreshError, match="larger than"):
        refresh_prices(now=NOW, url=price_server.url)
    assert price_server.sent_bytes < 2 * LIST_MAX_BYTES
    assert not ModelPrice.objects.exists()


def test_a_list_that_comes_packed_is_not_unpacked(price_server: PriceServer) -> None:
    price_server.publish(published())
    price_server.body = gzip.compress(price_server.body)
    price_server.coding = "gzip"
    with pytest.raises(RefreshError, match="packed"):
        refresh_prices(now=NOW, url=price_server.url)


def test_a_price_is_compared_with_the_one_in_force_not_with_the_shipped_one(price_server: PriceServer) -> None:
    for day, rate in enumerate(("25", "250")):  # ten times the shipped price, and then ten times that
        price_server.publish(published(**{"gpt-4o": {"input_mtok": rate, "output_mtok": "10"}}))
        refresh_prices(now=NOW + day * DAY, url=price_server.url)
    assert rated("gpt-4o", NOW + DAY) == (250, "refreshed")


def test_no_network_leaves_the_prices_as_they_are() -> None:
    with pytest.raises(RefreshError, match="ConnectError"):
        refresh_prices(now=NOW, url=NOWHERE, timeout_s=1)
    assert not ModelPrice.objects.exists()


def test_a_problem_does_not_repeat_the_address(price_server: PriceServer) -> None:
    price_server.status = 404
    with pytest.raises(RefreshError) as raised:
        refresh_prices(now=NOW, url=price_server.url.replace("//", "//user:hunter2@"))
    assert str(raised.value) == "HTTP status 404"


def test_the_command_says_what_changed_or_why_nothing_did(price_server: PriceServer, settings: Settings) -> None:
    settings.LIST_PRICES_URL = price_server.url
    settle(price_server)
    price_server.publish(published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}}))
    out = StringIO()
    call_command("refresh_prices", stdout=out)
    assert out.getvalue() == "1 list prices have changed.\n"
    settings.LIST_PRICES_URL = NOWHERE
    with pytest.raises(CommandError, match="ConnectError"):
        call_command("refresh_prices")


def test_the_task_refreshes_only_if_the_operator_wants_it(price_server: PriceServer, settings: Settings) -> None:
    settings.LIST_PRICES_URL = price_server.url
    settle(price_server)
    price_server.publish(published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}}))
    assert settings.REFRESH_LIST_PRICES is False
    assert tasks.refresh_prices() == 0
    settings.REFRESH_LIST_PRICES = True
    assert tasks.refresh_prices() == 1
