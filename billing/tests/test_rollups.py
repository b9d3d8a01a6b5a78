"""Roll-ups, grown and rebuilt."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from django.db import transaction
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from billing.events import OUTCOMES, USAGE_SOURCES, Usage, UsageEvent
from billing.models import UsageDay, UsageRecord
from billing.rollups import SUMS, Group, add_to_rollups
from billing.services import rebuild_usage_days, record_events
from billing.tests.recorded import day_rows
from billing.tests.samples import NOW, event

pytestmark = pytest.mark.django_db

events_of_any_kind = st.builds(
    event,
    key=st.sampled_from("abc"),
    at=st.integers(0, 60).map(lambda hours: NOW + dt.timedelta(hours=hours)),
    model=st.sampled_from(["gpt-4o-mini", "gpt-4o", "nobody-knows-me", ""]),
    endpoint=st.sampled_from(["/v1/chat/completions", "/v1/embeddings"]),
    status=st.sampled_from([0, 200, 200, 200, 400, 401, 429, 500]),
    outcome=st.sampled_from(OUTCOMES),
    usage_source=st.sampled_from(USAGE_SOURCES),
    usage=st.builds(
        Usage,
        input_tokens=st.integers(0, 10**6),
        cached_input_tokens=st.integers(0, 100),
        audio_output_tokens=st.integers(0, 3),
        seconds=st.floats(0, 100),
    ),
    proxy_ms=st.floats(0, 50),
)


@examples(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(events_of_any_kind, min_size=1, max_size=30), st.integers(1, 8), st.randoms())
def test_rebuilt_days_equal_those_that_grew(events: list[UsageEvent], batch: int, random: Any) -> None:
    with transaction.atomic():
        given_twice = [*events, *random.sample(events, len(events) // 2)]
        random.shuffle(given_twice)
        for start in range(0, len(given_twice), batch):
            record_events(given_twice[start : start + batch])
        grown = day_rows()
        add_to_rollups({Group(None, NOW.date(), 12, "wrong", "wrong"): [7] * len(SUMS)})
        rebuild_usage_days(NOW.date(), NOW.date() + dt.timedelta(days=3))
        assert day_rows() == grown
        assert UsageRecord.objects.count() == len(events) == sum(UsageDay.objects.values_list("requests", flat=True))
        transaction.set_rollback(True)


def test_a_rebuild_leaves_other_days_alone() -> None:
    record_events([event(), event(at=NOW + dt.timedelta(days=1))])
    UsageDay.objects.update(requests=9)
    assert rebuild_usage_days(NOW.date(), NOW.date()) == 1
    assert list(UsageDay.objects.order_by("day").values_list("requests", flat=True)) == [1, 9]
