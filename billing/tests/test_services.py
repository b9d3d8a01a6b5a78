from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from decimal import Decimal
from typing import Any

import pytest
import redis
from django.conf import settings as project
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import ProtectedError
from django.utils import timezone
from pytest_django import DjangoCaptureOnCommitCallbacks, Settings

from billing import policy, selectors
from billing.models import ApiKey, AppendOnlyError, Grant, ModelPrice, Pricing, Purge, UsageDay, UsageRecord
from billing.services import (
    block_key,
    ensure_key,
    give_grant,
    purge_usage,
    rebuild_usage_days,
    record_events,
    reprice,
    revoke_grant,
    save_policy,
    unblock_key,
)
from billing.tests.recorded import SAMPLE_COST, day_rows
from billing.tests.samples import NOW, event, key_fingerprint

pytestmark = pytest.mark.django_db
DAY = dt.timedelta(days=1)
PATIENCE_S = 60.0


@pytest.fixture
def key() -> ApiKey:
    return ensure_key(fingerprint=key_fingerprint("a"), hint="sk-…wxyz")


# Keys and grants


def test_a_key_entered_twice_is_one_key(key: ApiKey) -> None:
    assert ensure_key(fingerprint=key.fingerprint, hint="other") == key
    assert ApiKey.objects.get().hint == "sk-…wxyz"


def test_a_grant_says_who_gave_it_and_counts_until_it_is_revoked(key: ApiKey) -> None:
    operator = get_user_model().objects.create_user("operator")
    grant = give_grant(key, Decimal("12.3456789"), reason="paid", given_by=operator)
    grant.refresh_from_db()
    assert (grant.amount_usd, grant.given_by, grant.reason) == (Decimal("12.3456789"), operator, "paid")
    assert revoke_grant(grant)
    assert not revoke_grant(grant)
    balance = selectors.balance_for_key(key.fingerprint, timezone.now())
    assert balance is not None
    assert balance.total == 0


@pytest.mark.parametrize("amount_usd", [Decimal(0), Decimal(-1)])
def test_a_grant_of_nothing_or_less_is_refused(key: ApiKey, amount_usd: Decimal) -> None:
    with pytest.raises(ValidationError):
        give_grant(key, amount_usd)
    with pytest.raises(IntegrityError), transaction.atomic():
        Grant.objects.create(key=key, amount_usd=amount_usd)


def test_a_grant_that_ends_before_it_begins_is_refused(key: ApiKey) -> None:
    with pytest.raises(ValidationError):
        give_grant(key, Decimal(1), valid_from=NOW, valid_until=NOW)


def test_blocking_shows_in_the_policy_and_ends_with_unblocking(key: ApiKey) -> None:
    assert block_key(key, now=NOW)
    assert not block_key(key, now=NOW + DAY)
    assert selectors.blocked_fingerprints() == {key.fingerprint}
    assert ApiKey.objects.get().blocked_at == NOW
    assert unblock_key(key)
    assert not unblock_key(key)
    assert selectors.blocked_fingerprints() == frozenset()
    assert ApiKey.objects.get().blocked_at is None


def test_what_is_saved_of_a_key_undoes_no_block_and_no_first_use_that_came_meanwhile(
    key: ApiKey, settings: Settings
) -> None:
    settings.DEFAULT_GRANT_USD = Decimal(5)
    read_before = ApiKey.objects.get()
    record_events([event()])
    block_key(key)
    read_before.label = "Ada"
    save_policy(read_before)
    record_events([event()])
    now = ApiKey.objects.get()
    assert (now.label, now.blocked, now.first_used_at, now.last_used_at) == ("Ada", True, NOW, NOW)
    assert Grant.objects.count() == 1


def test_a_change_of_policy_is_announced_once_it_is_in(
    key: ApiKey, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    versions = [policy.version()]
    for change in (block_key, block_key, unblock_key):
        with django_capture_on_commit_callbacks(execute=True):
            change(key)
        versions.append(policy.version())
    assert versions[1] == versions[2]
    assert len(set(versions)) == 3


def test_with_redis_gateways_hear_of_it_at_once(
    key: ApiKey,
    redis_url: str,
    settings: Settings,
    django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks,
) -> None:
    settings.REDIS_URL = redis_url
    with redis.Redis.from_url(redis_url) as client, client.pubsub() as listener:
        listener.subscribe(policy.CHANNEL)
        assert listener.get_message(timeout=PATIENCE_S) is not None
        with django_capture_on_commit_callbacks(execute=True):
            block_key(key)
        # Others may speak there, too.
        heard = iter(lambda: listener.get_message(timeout=PATIENCE_S), None)
        assert policy.version() in (message["data"].decode() for message in heard)


def test_a_redis_that_is_away_does_not_stop_the_click(
    key: ApiKey, settings: Settings, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1"
    with django_capture_on_commit_callbacks(execute=True):
        assert block_key(key)
    assert selectors.blocked_fingerprints() == {key.fingerprint}


# Append-only


def test_a_record_is_neither_changed_nor_removed_by_hand() -> None:
    record_events([event()])
    record = UsageRecord.objects.get()
    attempts = [
        record.save,
        record.delete,
        UsageRecord.objects.all().delete,
        lambda: UsageRecord.objects.update(cost_usd=0),
        lambda: UsageRecord.objects.bulk_update([record], ["cost_usd"]),
    ]
    for attempt in attempts:
        with pytest.raises(AppendOnlyError):
            attempt()
    with pytest.raises(ProtectedError):
        ApiKey.objects.all().delete()


# Re-pricing


def test_reprice_rates_what_was_unpriced_and_the_roll_ups_follow() -> None:
    record_events([event(model="mine", at=NOW + DAY * n) for n in range(3)] + [event()])
    ModelPrice.objects.create(model="mine", valid_from=NOW + DAY, input=Decimal(10), output=Decimal(10))
    seen: list[int] = []
    done = reprice(NOW - DAY, progress=seen.append)

    assert (done.examined, done.changed, sum(seen)) == (4, 2, 4)
    own = UsageRecord.objects.filter(model="mine").order_by("started_at")
    assert [record.pricing for record in own] == ["unpriced", "priced", "priced"]
    assert [record.cost_usd for record in own] == [None, Decimal("0.017"), Decimal("0.017")]
    assert {record.price_source for record in own} == {"", "own"}
    assert sum(UsageDay.objects.values_list("cost_usd", flat=True)) == 2 * Decimal("0.017") + SAMPLE_COST
    assert sum(UsageDay.objects.values_list("unpriced_requests", flat=True)) == 1


def test_reprice_a_second_time_changes_nothing() -> None:
    record_events([event(), event(model="mine")])
    ModelPrice.objects.create(model="gpt-4o-mini", valid_from=NOW, input=Decimal(1), output=Decimal(1))
    assert reprice(NOW).changed == 1
    before = day_rows()
    assert reprice(NOW).changed == 0
    assert day_rows() == before


def test_reprice_keeps_to_its_date_and_its_models() -> None:
    for model in ("mine-1", "mine-2", "other"):
        record_events([event(model=model), event(model=model, at=NOW + DAY)])
    ModelPrice.objects.create(model="*", valid_from=NOW - DAY, input=1, output=1)
    assert reprice(NOW + DAY, model="mine-1").changed == 1
    assert reprice(NOW + DAY, model="mine-*").changed == 1
    assert UsageRecord.objects.filter(pricing=Pricing.PRICED).count() == 2


def test_reprice_does_not_look_at_days_before_there_was_anything(django_assert_max_num_queries: Any) -> None:
    record_events([event(model="mine", at=timezone.now() - DAY)])
    ModelPrice.objects.create(model="mine", valid_from=NOW - 999 * DAY, input=Decimal(10), output=Decimal(10))
    with django_assert_max_num_queries(100):
        assert reprice(dt.datetime(1970, 1, 1, tzinfo=dt.UTC)).changed == 1
    UsageDay.objects.update(cost_usd=0)
    assert reprice(dt.datetime(1970, 1, 1, tzinfo=dt.UTC), model="none").changed == 0
    assert UsageDay.objects.get().cost_usd == Decimal("0.017")


def test_reprice_keeps_the_factor_of_the_record() -> None:
    record_events([event(model="mine")])
    ApiKey.objects.update(price_factor=100)
    ModelPrice.objects.create(model="mine", valid_from=NOW, input=Decimal(10), output=Decimal(10))
    reprice(NOW)
    assert UsageRecord.objects.get().cost_usd == Decimal("0.017")


def test_between_two_chunks_records_and_sums_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing.repricing._RECORDS_PER_CHUNK", 2)
    record_events([event(model="mine", key=f"k{n % 2}") for n in range(7)])
    ModelPrice.objects.create(model="mine", valid_from=NOW, input=Decimal(10), output=Decimal(10))
    sums: list[Decimal] = []

    def compare(examined: int) -> None:
        of_records = sum(record.cost_usd or Decimal(0) for record in UsageRecord.objects.all())
        assert of_records == sum(UsageDay.objects.values_list("cost_usd", flat=True))
        sums.append(Decimal(of_records))

    reprice(NOW, progress=compare)
    assert sums == [Decimal("0.017") * n for n in (2, 4, 6, 7)]


# Retention


def test_a_purge_takes_old_records_and_leaves_the_roll_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing.retention._RECORDS_PER_CHUNK", 2)
    record_events([event(at=NOW + DAY * (n % 3)) for n in range(15)])
    before = day_rows()
    chunks: list[int] = []
    assert purge_usage(NOW.date() + 2 * DAY, progress=chunks.append) == 10
    assert chunks == [2] * 5
    assert set(UsageRecord.objects.values_list("day", flat=True)) == {NOW.date() + 2 * DAY}
    assert day_rows() == before
    run = Purge.objects.get()
    assert (run.deleted, run.finished_at is not None) == (10, True)


def test_purged_days_are_never_rebuilt_also_not_by_reprice() -> None:
    record_events([event(at=NOW + DAY * n) for n in range(4)])
    before = day_rows()
    purge_usage(NOW.date() + 2 * DAY)
    assert rebuild_usage_days(NOW.date(), NOW.date() + 3 * DAY) == 2
    reprice(NOW - DAY)
    assert day_rows() == before


def test_a_purge_cut_short_leaves_its_days_out_of_rebuilds() -> None:
    record_events([event(), event()])
    before = day_rows()

    def fail(removed: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        purge_usage(NOW.date() + DAY, progress=fail)
    rebuild_usage_days(NOW.date(), NOW.date())
    assert day_rows() == before


@pytest.mark.parametrize(
    "given",
    [
        {"USAGE_RETENTION_DAYS": "89"},
        {"USAGE_WINDOW_DAYS": "120", "USAGE_RETENTION_DAYS": "119"},
        {"DEFAULT_GRANT_USD": "many"},
        {"BALANCE_SOURCE": "both"},
    ],
)
def test_a_wrong_setting_stops_the_start_and_is_named(given: dict[str, str]) -> None:
    command = [sys.executable, "-c", "import proxysite.settings"]
    done = subprocess.run(command, cwd=project.BASE_DIR, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImproperlyConfigured: {list(given)[-1]}: " in done.stderr
