"""Every change of the ledger that somebody asks for; what the gateway reports comes in by `record_events`."""

from __future__ import annotations

import datetime as dt
import logging
from decimal import Decimal
from typing import Any

import msgspec
from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from billing import policy
from billing.list_prices import ListPrice, all_list_prices, refresh_list_prices
from billing.models import ApiKey, Grant, ModelPrice, PriceSource
from billing.pricing import TOKEN_PRICES, UNIT_PRICES
from billing.recording import RecordResult, record_events
from billing.repricing import reprice
from billing.retention import purge_usage
from billing.rollups import rebuild_usage_days

logger = logging.getLogger(__name__)

__all__ = [
    "RecordResult",
    "block_key",
    "ensure_key",
    "give_grant",
    "purge_usage",
    "rebuild_usage_days",
    "record_events",
    "refresh_prices",
    "reprice",
    "revoke_grant",
    "unblock_key",
]


def ensure_key(*, fingerprint: str, hint: str) -> ApiKey:
    """Return the key of that fingerprint, made if it is new: an operator may know a key before its first use."""
    key, _ = ApiKey.objects.get_or_create(fingerprint=fingerprint, defaults={"hint": hint})
    return key


def give_grant(
    key: ApiKey,
    amount_usd: Decimal,
    *,
    reason: str = "",
    valid_from: dt.datetime | None = None,
    valid_until: dt.datetime | None = None,
    given_by: User | None = None,
) -> Grant:
    """Give a key an amount to use, from now on if no time is said. Raises ValidationError."""
    grant = Grant(
        key=key,
        amount_usd=amount_usd,
        reason=reason,
        valid_from=valid_from or timezone.now(),
        valid_until=valid_until,
        given_by=given_by,
    )
    grant.full_clean()
    grant.save(force_insert=True)
    return grant


def revoke_grant(grant: Grant, *, now: dt.datetime | None = None) -> bool:
    """Make a grant count no more; return whether it did until now."""
    return bool(Grant.objects.filter(pk=grant.pk, revoked_at=None).update(revoked_at=now or timezone.now()))


def block_key(key: ApiKey, *, now: dt.datetime | None = None) -> bool:
    """Have every gateway refuse the key, within 30 s or at once with Redis; return whether it was not blocked yet."""
    return _set_blocked(key, now or timezone.now())


def unblock_key(key: ApiKey) -> bool:
    return _set_blocked(key, None)


def refresh_prices(*, now: dt.datetime | None = None, **source: Any) -> int:
    """Fetch the newest list prices and write down, from now on, those that have changed; return how many.

    The shipped list and what operators entered stay as they are. `source` goes to `refresh_list_prices`.
    """
    now = now or timezone.now()
    refresh = refresh_list_prices(now=now, **source)
    if not refresh.is_updated:
        logger.warning("list prices were not refreshed: %s", refresh.problem)
        return 0
    refreshed = ModelPrice.objects.filter(source=PriceSource.REFRESHED).order_by("valid_from")
    latest = {row.model: row.details for row in refreshed}
    current = {listed.model: listed for listed in reversed(list(all_list_prices(now)))}
    names = {listed.model for listed in refresh.changed} | latest.keys()
    new = [_refreshed_row(current[name], now, refresh.version) for name in sorted(names & current.keys())]
    changed = [row for row in new if row.details != latest.get(row.model)]
    ModelPrice.objects.bulk_create(changed, ignore_conflicts=True)
    return len(changed)


def _refreshed_row(listed: ListPrice, now: dt.datetime, version: str) -> ModelPrice:
    rates = {name: getattr(listed.price, name) for name in (*TOKEN_PRICES, *UNIT_PRICES, "batch_factor")}
    return ModelPrice(
        model=listed.model,
        valid_from=now,
        source=PriceSource.REFRESHED,
        details=msgspec.json.decode(msgspec.json.encode(listed.price)),
        note=version[:200],
        **rates,
    )


def _set_blocked(key: ApiKey, blocked_at: dt.datetime | None) -> bool:
    is_blocked = blocked_at is not None
    with transaction.atomic():
        others = ApiKey.objects.filter(pk=key.pk, blocked=not is_blocked)
        has_changed = bool(others.update(blocked=is_blocked, blocked_at=blocked_at))
        if has_changed:
            policy.announce_change()
    return has_changed
