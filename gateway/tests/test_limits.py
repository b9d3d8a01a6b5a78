"""The arithmetic of limits."""

from __future__ import annotations

import calendar
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.limits import Limits, duration_text, month_of, next_month_s, take


@given(st.integers(1, 10_000), st.lists(st.floats(0, 5), min_size=1, max_size=300))
def test_no_more_passes_than_the_limit_at_once_and_what_comes_back_in_time(limit: int, pauses: list[float]) -> None:
    now, full_at, taken = 1_795_300_000.0, 0.0, 0
    began = now
    for pause in pauses:
        now += pause
        bucket = take(full_at, now, limit=limit, amount=1)
        if not bucket.wait_s:
            full_at = bucket.full_at
            taken += 1
    assert taken <= limit + (now - began) * limit / 60 + 1e-3


def test_after_the_told_wait_there_is_enough() -> None:
    now = 1_795_300_000.0
    full_at = take(0, now, limit=30, amount=30).full_at
    refused = take(full_at, now, limit=30, amount=1)
    assert refused.wait_s == pytest.approx(2.0, abs=1e-3)
    assert refused.remaining == 0
    assert not take(full_at, now + refused.wait_s, limit=30, amount=1).wait_s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0171, "17ms"), (1, "1s"), (1.25, "1.25s"), (59.5, "59.5s"), (360, "6m0s"), (3725, "1h2m5s")],
)
def test_times_are_told_as_openai_tells_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_months_end_where_the_calendar_says() -> None:
    for year in range(2024, 2032):
        for month in range(1, 13):
            now = calendar.timegm((year, month, 15, 3, 4, 5))
            next_one = calendar.timegm((year + (month == 12), month % 12 + 1, 1, 0, 0, 0))
            assert next_month_s(now) == next_one - now
            assert month_of(now) == f"{year}-{month:02}"


def test_models_are_allowed_by_name_and_by_beginning() -> None:
    limits = Limits(models=("gpt-4o-mini", "o3*"))
    assert [limits.allows_model(name) for name in ("gpt-4o-mini", "GPT-4o-mini", "o3", "o3-pro")] == [True] * 4
    assert not any(map(limits.allows_model, ("gpt-4o", "gpt-4o-mini-2024-07-18", "", "xo3")))
    assert Limits().allows_model("")


def test_networks_are_of_both_families() -> None:
    limits = Limits(networks=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")))
    assert limits.allows_address(ip_address("192.0.2.7"))
    assert limits.allows_address(ip_address("2001:db8::1"))
    assert not limits.allows_address(ip_address("192.0.3.7"))
    assert not limits.allows_address(None)
