"""An upstream that reports absurd counts, an operator who grants absurd amounts: no batch fails, each page is there."""

from __future__ import annotations

import datetime as dt
import warnings
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import connection
from django.test import Client
from django.utils import timezone

from billing import selectors, services
from billing.events import Usage
from billing.models import ApiKey, Grant, KeyDay, ModelPrice, UsageDay, UsageHour, UsageRecord
from billing.pricing import MAX_COST_USD, MAX_QUANTITY
from billing.rollups import SUMS, TALLIES, rebuild_usage_days
from billing.services import give_grant, record_events
from billing.sums import MOST
from billing.tests.samples import API_KEY, event
from billing.tests.test_admin_at_once import FINGERPRINT

pytestmark = pytest.mark.django_db
LONGEST = 2**63 - 1
MOST_USD = Decimal(MOST).scaleb(-7)
BEARER = {"Authorization": f"Bearer {API_KEY}"}
ABSURD = Usage(**{name: MAX_QUANTITY for name in Usage.__struct_fields__ if name != "seconds"})
PAGES = (
    "/pro/balance",
    "/pro/usage",
    "/pro/usage?format=csv",
    "/dashboard/billing/subscription",
    "/dashboard/billing/usage",
    "/dashboard/billing/credit_grants",
    "/admin/",
    "/admin/?period=90d",
    *(
        f"/admin/billing/{name}/{page}"
        for name in ("apikey", "grant", "usageday", "usagerecord")
        for page in ("", "export/")
    ),
)


@pytest.fixture
def key() -> ApiKey:
    record_events([event(at=timezone.now(), key_fingerprint=FINGERPRINT)])
    return ApiKey.objects.get()


_COUNTS = {"requests", "errors", "unpriced_requests"}  # which no upstream says


def set_all_sums(units: int) -> None:
    """Make each sum of what upstreams say as large as that."""
    for table, sums in ((UsageDay, SUMS), (KeyDay, TALLIES), (UsageHour, TALLIES)):
        with connection.cursor() as cursor:
            changes = ", ".join(f"{name} = {units}" for name in sums if name not in _COUNTS)
            cursor.execute(f"UPDATE {table._meta.db_table} SET {changes}")


def kept_sums() -> set[Any]:
    """Return all sums of tokens and money that are kept."""
    days = UsageDay.objects.values_list("input_tokens", "output_tokens", "cost_usd")
    tallies = [table.objects.values_list("tokens", "cost_usd") for table in (KeyDay, UsageHour)]
    return {value for rows in (days, *tallies) for row in rows for value in row}


@pytest.mark.parametrize("before", [LONGEST, MOST, LONGEST - MAX_QUANTITY])
def test_a_batch_is_recorded_where_sums_are_as_long_as_they_can_be(key: ApiKey, before: int) -> None:
    set_all_sums(before)
    absurd = event(at=timezone.now(), key_fingerprint=FINGERPRINT, usage=ABSURD, proxy_ms=1e9)
    assert record_events([absurd]).recorded == 1
    assert kept_sums() == {MOST, MOST_USD}
    assert record_events([absurd, event(at=timezone.now())]).recorded == 1


def test_one_request_costs_at_most_what_can_be_summed_up(key: ApiKey) -> None:
    ApiKey.objects.update(price_factor=Decimal("99999.9999"))
    ModelPrice.objects.create(
        model="dear",
        valid_from=timezone.now() - dt.timedelta(days=1),
        **dict.fromkeys(
            (
                "input",
                "output",
                "audio_input",
                "audio_output",
                "image_input",
                "image_output",
                "per_image",
                "per_million_characters",
                "per_request",
            ),
            Decimal(999_999_999),
        ),
    )
    for usage in (ABSURD, Usage(input_tokens=MAX_QUANTITY), Usage(seconds=float(MAX_QUANTITY)), Usage()):
        model = "gpt-4o-mini" if usage.seconds else "dear"
        done = record_events([event(at=timezone.now(), key_fingerprint=FINGERPRINT, model=model, usage=usage)])
        assert done.recorded == 1
        assert done.sums["cost_usd"] <= MAX_COST_USD.scaleb(7)
    assert MAX_COST_USD in UsageRecord.objects.values_list("cost_usd", flat=True)
    assert all(cost is None or cost <= MAX_COST_USD for cost in UsageRecord.objects.values_list("cost_usd", flat=True))


def test_a_batch_of_nothing_but_absurd_counts_is_recorded_and_rebuilt_the_same(key: ApiKey) -> None:
    ApiKey.objects.update(price_factor=Decimal("99999.9999"))
    events = [event(at=timezone.now(), key_fingerprint=FINGERPRINT, usage=ABSURD) for _ in range(2000)]
    assert record_events(events).recorded == 2000
    before = [list(table.objects.order_by("pk").values_list(*sums)) for table, sums in _KEPT]
    assert kept_sums() > {2000 * MAX_QUANTITY + 500}
    today = timezone.now().date()
    rebuild_usage_days(today - dt.timedelta(days=1), today)
    assert [list(table.objects.order_by("pk").values_list(*sums)) for table, sums in _KEPT] == before


_KEPT: Any = ((UsageDay, SUMS), (KeyDay, TALLIES), (UsageHour, TALLIES))


def test_records_too_large_to_be_summed_up_are_rebuilt(key: ApiKey) -> None:
    record = UsageRecord.objects.get()
    columns = {field.attname: getattr(record, field.attname) for field in record._meta.concrete_fields}
    enormous = {"cost_usd": Decimal(2**62).scaleb(-7), "output_tokens": 2**62}
    UsageRecord.objects.bulk_create(UsageRecord(**columns | enormous | {"event_id": f"{n}"}) for n in range(9))
    rebuild_usage_days(record.day, record.day)
    assert {MOST, MOST_USD} < kept_sums()
    services.reprice(timezone.now() - dt.timedelta(days=1))
    assert MOST_USD not in kept_sums()


@pytest.mark.parametrize("units", [MOST, LONGEST])
def test_every_page_is_there_whatever_the_sums_are(client: Client, key: ApiKey, units: int) -> None:
    today = timezone.now().date()
    for back in range(1, 90):
        KeyDay.objects.create(key=key, day=today - dt.timedelta(days=back))
        UsageDay.objects.create(key=key, day=today - dt.timedelta(days=back), model="m", endpoint="/v1/x")
        UsageHour.objects.create(day=today - dt.timedelta(days=back), hour=1, model="m", endpoint="/v1/x")
    set_all_sums(units)
    Grant.objects.bulk_create(
        Grant(key=key, amount_usd=Decimal(999_999_999), valid_from=timezone.now()) for _ in range(1000)
    )
    client.force_login(get_user_model().objects.create_superuser("operator", password="-"))
    for page in (*PAGES, f"/admin/billing/apikey/{key.pk}/change/"):
        response: Any = client.get(page, headers=BEARER)
        assert response.status_code == 200, page
        if response.streaming:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this client reads an asynchronous answer at once
                assert len(b"".join(response).splitlines()) > 1
    balance = selectors.balance_for_key(FINGERPRINT, timezone.now())
    assert balance is not None
    for found, exact in ((balance.total, Decimal(999_999_999_000)), (balance.used, Decimal(units).scaleb(-7) * 90)):
        assert abs(found - exact) <= exact / 10**14
    assert selectors.units_spent(today)[FINGERPRINT] >= units


def test_a_grant_is_below_a_billion(key: ApiKey) -> None:
    with pytest.raises(ValidationError):
        give_grant(key, Decimal(10**12))
    with pytest.raises(ValidationError):
        give_grant(key, Decimal(10**30))
    give_grant(key, Decimal("999999999.9999999"))
