from __future__ import annotations

import datetime as dt
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import DjangoAssertNumQueries

from billing.events import Usage
from billing.fields import units_to_usd, usd_to_units
from billing.models import ApiKey
from billing.rollups import SUMS, Group, add_to_rollups
from billing.selectors import Balance, balance_for_key, balances_of, daily_costs, usage_rows, window_start
from billing.services import give_grant, record_events, revoke_grant
from billing.tests.samples import NOW, event, key_fingerprint
from billing.tests.test_recording import SAMPLE_COST

DAY = dt.timedelta(days=1)
pytestmark = pytest.mark.django_db
A = key_fingerprint("a")


def balance(now: dt.datetime = NOW) -> Balance:
    found = balance_for_key(A, now)
    assert found is not None
    return found


def test_a_key_never_seen_has_no_balance() -> None:
    record_events([event(key="b")])
    assert balance_for_key(A, NOW) is None


def test_a_balance_is_grants_minus_use() -> None:
    record_events([event(), event(), event(model="nobody-knows-me"), event(key="b")])
    give_grant(ApiKey.objects.get(fingerprint=A), Decimal(18), valid_from=NOW)
    give_grant(ApiKey.objects.get(fingerprint=key_fingerprint("b")), Decimal(5), valid_from=NOW)
    assert balance() == Balance(total=Decimal(18), used=2 * SAMPLE_COST, unpriced_requests=1)
    assert balance().balance == Decimal("17.99907")


def test_use_without_grants_is_overdrawn() -> None:
    record_events([event()])
    assert balance().balance == -SAMPLE_COST


def test_the_window_holds_the_last_90_days_today_included() -> None:
    record_events([event(at=NOW - DAY * age) for age in (0, 89, 90, 200)])
    assert window_start(NOW) == NOW.date() - 89 * DAY
    assert balance().used == 2 * SAMPLE_COST
    assert balance(NOW + DAY).used == SAMPLE_COST


def test_the_window_begins_at_midnight_utc_wherever_the_clock_stands() -> None:
    in_tokyo = NOW.replace(hour=20).astimezone(dt.timezone(dt.timedelta(hours=9)))
    assert window_start(in_tokyo) == window_start(NOW)


@pytest.mark.parametrize(
    ("begins", "ends", "is_revoked", "counts"),
    [
        (0, None, False, True),
        (1, None, False, False),
        (-5, 0, False, False),
        (-5, 1, False, True),
        (-5, None, True, False),
    ],
)
def test_a_grant_counts_while_it_is_valid(begins: int, ends: int | None, is_revoked: bool, counts: bool) -> None:
    record_events([event()])
    until = None if ends is None else NOW + DAY * ends
    grant = give_grant(ApiKey.objects.get(), Decimal(3), valid_from=NOW + DAY * begins, valid_until=until)
    if is_revoked:
        revoke_grant(grant, now=NOW)
    assert balance().total == (3 if counts else 0)


def test_a_balance_takes_three_queries_however_much_there_is(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    with django_assert_num_queries(3):
        assert balance_for_key(A, NOW) is None
    record_events([event(at=NOW - DAY * (n % 100), model=f"m{n % 7}") for n in range(400)])
    for n in range(5):
        give_grant(ApiKey.objects.get(), Decimal(n + 1), valid_from=NOW)
    with django_assert_num_queries(3):
        assert balance().total == 15


def test_the_balances_of_many_keys_take_two_queries(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    record_events([event(key=f"k{n}") for n in range(30)])
    key_ids = list(ApiKey.objects.values_list("pk", flat=True))
    with django_assert_num_queries(2):
        balances = balances_of([*key_ids, 10**9], NOW)
    assert balances.pop(10**9) == Balance(Decimal(0), Decimal(0))
    assert balances == dict.fromkeys(key_ids, Balance(Decimal(0), SAMPLE_COST))


def test_money_adds_up_exactly_after_many_increments() -> None:
    record_events([event()])
    key, odd_units = ApiKey.objects.get(), 3_333_333
    sums = [odd_units if name == "cost_usd" else 0 for name in SUMS]
    for _ in range(300):
        add_to_rollups({Group(key.pk, NOW.date(), 12, "m", "e"): sums})
    assert balance().used == Decimal("99.99999") + SAMPLE_COST
    assert isinstance(balance().used, Decimal)


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_the_three_numbers_add_up_in_cents(total_units: int, used_units: int) -> None:
    cents = Balance(units_to_usd(total_units), units_to_usd(used_units)).in_cents()
    assert cents.total - cents.used == cents.balance
    for amount in (cents.total, cents.used, cents.balance):
        assert amount.as_tuple().exponent == -2
    assert usd_to_units(units_to_usd(total_units)) == total_units


def test_usage_rows_tell_cached_input_from_input_and_take_in_every_kind() -> None:
    usage = Usage(
        input_tokens=1,
        cached_input_tokens=2,
        cache_write_tokens=4,
        output_tokens=8,
        audio_input_tokens=16,
        cached_audio_input_tokens=32,
        audio_output_tokens=64,
        image_input_tokens=128,
        cached_image_input_tokens=256,
        image_output_tokens=512,
        reasoning_tokens=5,
    )
    record_events([event(usage=usage)])
    (row,) = usage_rows(A, NOW.date(), NOW.date())
    assert (row.input_tokens, row.cached_input_tokens, row.output_tokens) == (149, 290, 584)


def test_usage_rows_are_those_of_the_key_and_the_days_both_inclusive() -> None:
    record_events([event(at=NOW + DAY * n) for n in range(5)] + [event(key="b", at=NOW + DAY)])
    rows = list(usage_rows(A, NOW.date() + DAY, NOW.date() + 3 * DAY))
    assert [row.date for row in rows] == [NOW.date() + DAY * n for n in (1, 2, 3)]
    assert {(row.requests, row.cost) for row in rows} == {(1, SAMPLE_COST)}


def test_daily_costs_add_the_endpoints_and_leave_out_days_that_cost_nothing() -> None:
    record_events(
        [event(), event(endpoint="/v1/responses"), event(model="nobody-knows-me"), event(at=NOW + DAY, model="x")]
    )
    (cost,) = daily_costs(A, NOW.date(), NOW.date() + DAY)
    assert (cost.day, cost.model, cost.cost_usd) == (NOW.date(), "gpt-4o-mini", 2 * SAMPLE_COST)
