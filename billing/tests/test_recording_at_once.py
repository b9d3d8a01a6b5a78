"""Several who write to the ledger at one moment."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from django.db import connection, connections, transaction
from pytest_django import Settings

from billing.models import ApiKey, Grant, ModelPrice, Pricing, UsageDay, UsageRecord
from billing.services import rebuild_usage_days, record_events, reprice
from billing.tests.recorded import day_rows
from billing.tests.samples import NOW, event


def _in_threads(calls: list[Any]) -> list[Any]:
    """Start all of them at the same moment and return what they returned."""
    barrier = threading.Barrier(len(calls))

    def run(call: Any) -> Any:
        try:
            barrier.wait(60)
            return call()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(240) for future in [pool.submit(run, call) for call in calls]]


@pytest.mark.django_db(transaction=True)
def test_writers_of_the_same_events_record_each_once(settings: Settings) -> None:
    settings.DEFAULT_GRANT_USD = Decimal("5")
    events = [event(key=f"k{n % 11}", model=["gpt-4o", "gpt-4o-mini"][n % 2]) for n in range(300)]
    orders = [events, events[::-1], events[150:] + events[:150], events[::2] + events[1::2]]
    batches = [lambda order=order: [record_events(order[n : n + 50]) for n in range(0, 300, 50)] for order in orders]
    results = [result for done in _in_threads(batches) for result in done]

    assert sum(result.recorded for result in results) == 300
    assert sum(result.duplicates for result in results) == 900
    assert UsageRecord.objects.count() == sum(UsageDay.objects.values_list("requests", flat=True)) == 300
    assert Grant.objects.count() == ApiKey.objects.count() == 11


@pytest.mark.django_db(transaction=True)
def test_writers_on_the_same_days_lose_no_increment_while_they_are_rebuilt() -> None:
    def write(writer: int) -> None:
        for batch in range(12):
            keys_in_an_order_of_its_own = [(n * (writer + 1) + batch) % 13 for n in range(30)]
            # Rows that no rebuild has seen yet, in every batch.
            record_events(
                [event(key=f"k{n}", endpoint=f"/v1/{writer % 2}/{batch}") for n in keys_in_an_order_of_its_own]
            )

    def rebuild() -> None:
        for _ in range(30):
            rebuild_usage_days(NOW.date(), NOW.date())

    _in_threads([lambda: write(1), lambda: write(4), lambda: write(6), rebuild])
    grown = day_rows()
    assert sum(UsageDay.objects.values_list("requests", flat=True)) == UsageRecord.objects.count() == 3 * 12 * 30
    rebuild_usage_days(NOW.date(), NOW.date())
    assert day_rows() == grown


@pytest.mark.django_db(transaction=True)
def test_reprice_waits_for_what_is_being_recorded_by_the_prices_before() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one writer at a time")
    record_events([event()])
    is_recorded, is_priced = threading.Event(), threading.Event()

    def record() -> None:
        with transaction.atomic():
            record_events([event(model="new-model")])
            is_recorded.set()
            assert is_priced.wait(60)
            with connection.cursor() as cursor:
                waiting, deadline = 0, time.monotonic() + 60
                while not waiting and time.monotonic() < deadline:
                    cursor.execute(
                        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = "
                        "(SELECT oid FROM pg_database WHERE datname = current_database())"
                    )
                    (waiting,) = cursor.fetchone()
            assert waiting

    def price() -> None:
        assert is_recorded.wait(60)
        ModelPrice.objects.create(model="new-model", valid_from=NOW, input=1, output=1)
        is_priced.set()
        reprice(NOW)

    _in_threads([record, price])
    assert not UsageRecord.objects.filter(pricing=Pricing.UNPRICED).exists()
