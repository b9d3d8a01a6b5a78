from __future__ import annotations

import datetime as dt
from itertools import pairwise

import pytest
from pytest_django import DjangoAssertNumQueries

from billing import dashboard
from billing.dashboard import PERIODS, Period, Total
from billing.models import ApiKey, UsageHour
from billing.services import record_events
from billing.tests.recorded import SAMPLE_COST
from billing.tests.samples import NOW, event, key_fingerprint

pytestmark = pytest.mark.django_db
HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)
SAMPLE_TOKENS = 1700


def period(name: str) -> Period:
    return next(known for known in PERIODS if known.name == name)


def test_today_stands_beside_yesterday_at_the_same_time() -> None:
    half_past = NOW + HOUR / 2
    times = [NOW, NOW - HOUR, NOW - DAY, NOW - DAY + HOUR / 4, NOW - DAY - HOUR, NOW - DAY + 5 * HOUR, NOW - 2 * DAY]
    record_events([event(at=at) for at in times])
    found = dashboard.today(half_past)
    assert (found.so_far.requests, found.so_far.tokens, found.so_far.cost_usd) == (
        2,
        2 * SAMPLE_TOKENS,
        2 * SAMPLE_COST,
    )
    assert found.yesterday_so_far.requests == 2  # half of the two in this hour, and the one before
    assert found.yesterday.requests == 4


def test_averages_and_shares_are_those_of_the_requests() -> None:
    one = event(first_byte_ms=100, proxy_ms=1.0, is_stream=True)
    record_events([one, event(first_byte_ms=300, proxy_ms=2.0, status=500, is_stream=True)])
    total = dashboard.today(NOW).so_far
    assert (total.first_byte_ms, total.added_ms, total.error_rate) == (200, 1.5, 0.5)
    assert (Total().first_byte_ms, Total().added_ms, Total().error_rate) == (None, None, None)


@pytest.mark.parametrize(("name", "points"), [("24h", 24), ("7d", 7), ("90d", 90)])
def test_a_series_has_every_hour_or_day_up_to_now_and_nothing_older(name: str, points: int) -> None:
    step = HOUR if name == "24h" else DAY
    record_events([event(at=NOW - step * back) for back in (0, 1, points - 1, points)])
    found = dashboard.series(period(name), NOW + HOUR / 2)
    assert [found[place].total.requests for place in (-1, -2, 0)] == [1, 1, 1]
    assert len(found) == points
    assert sum(point.total.requests for point in found) == 3
    assert all(later.at - earlier.at == step for earlier, later in pairwise(found))


def test_what_costs_most_comes_first() -> None:
    record_events(
        [
            event(key="a"),
            event(key="b", model="gpt-4o"),
            event(key="b", at=NOW - 3 * DAY),
            event(key="c", at=NOW - 100 * DAY),
        ]
    )
    dear, cheap = (ApiKey.objects.get(fingerprint=key_fingerprint(name)) for name in ("b", "a"))
    assert [key for key, _ in dashboard.top_keys(period("7d"), NOW)] == [dear, cheap]
    assert dashboard.top_keys(period("7d"), NOW)[0][1].requests == 2
    assert dashboard.top_keys(period("24h"), NOW)[0][1].requests == 1
    models = dashboard.top_models(period("7d"), NOW)
    assert [(model, total.requests) for model, total in models] == [("gpt-4o", 1), ("gpt-4o-mini", 2)]


def test_unpriced_models_are_named_with_their_requests() -> None:
    record_events([event(model="mine"), event(model="mine"), event(model="old", at=NOW - 95 * DAY), event()])
    assert dashboard.unpriced_models(NOW, days=90) == [("mine", 2)]


def test_the_figures_take_as_many_queries_with_more_rows(django_assert_num_queries: DjangoAssertNumQueries) -> None:
    for count in (1, 40):
        record_events([event(key=f"k{n}", model=f"m{n}", at=NOW - HOUR * n) for n in range(count)])
        for name in ("24h", "7d", "90d"):
            with django_assert_num_queries(6):
                dashboard.today(NOW)
                dashboard.series(period(name), NOW)
                dashboard.top_models(period(name), NOW)
                dashboard.top_keys(period(name), NOW)
                dashboard.unpriced_models(NOW, days=90)
    assert UsageHour.objects.count() > 30
