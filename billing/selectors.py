"""Every question to the ledger. Amounts are exact decimals in USD; days are UTC."""

from __future__ import annotations

import datetime as dt
import functools
import operator
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from django.conf import settings
from django.db.models import F, Q, QuerySet, Sum

from billing.fields import units_to_usd, usd_to_units
from billing.limits import KeyLimits, KeyPolicy, read_models, read_networks
from billing.models import ApiKey, Grant, KeyDay, UsageDay
from billing.sums import WideSum

_CENT = Decimal("0.01")
_ZERO = units_to_usd(0)
_NO_KEY = 0  # no row has it


@dataclass(frozen=True, slots=True)
class Balance:
    """What a key was granted and what it used of it within the window; `balance` is negative if overdrawn.

    `unpriced_requests` are in no sum yet: their models have no known price.
    """

    total: Decimal
    used: Decimal
    unpriced_requests: int = 0

    @property
    def balance(self) -> Decimal:
        return self.total - self.used

    def in_cents(self) -> Balance:
        """Return the same with two decimals, rounded so that the three numbers still add up."""
        total, used = (amount.quantize(_CENT, ROUND_HALF_UP) for amount in (self.total, self.used))
        return Balance(total, used, self.unpriced_requests)


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What a key used on a day with a model at an endpoint: all kinds of tokens, cached input apart from input.

    `cost` is without the `unpriced_requests`, whose model has no known price.
    """

    date: dt.date
    model: str
    endpoint: str
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost: Decimal
    unpriced_requests: int


@dataclass(frozen=True, slots=True)
class DailyCost:
    day: dt.date
    model: str
    cost_usd: Decimal


def window_start(now: dt.datetime) -> dt.date:
    """Return the first of the USAGE_WINDOW_DAYS days, today included, whose cost counts against the grants."""
    return now.astimezone(dt.UTC).date() - dt.timedelta(days=settings.USAGE_WINDOW_DAYS - 1)


def balance_for_key(fingerprint: str, now: dt.datetime) -> Balance | None:
    """Return grants minus the last USAGE_WINDOW_DAYS of use, None for a key never seen.

    Three queries, whatever is there and whether the key is. Roll-ups are written in the transaction of their
    records, so today's use is in them.
    """
    key_id = ApiKey.objects.filter(fingerprint=fingerprint).values_list("pk", flat=True).first()
    balances = balances_of([_NO_KEY if key_id is None else key_id], now)
    return None if key_id is None else balances[key_id]


def balances_of(key_ids: Collection[int], now: dt.datetime) -> dict[int, Balance]:
    """Return the balance of each of these keys, in two queries for all of them."""
    grants = valid_grants(Grant.objects.filter(key__in=key_ids), now)
    granted = dict(grants.order_by().values_list("key").annotate(total=WideSum("amount_usd")))
    days = KeyDay.objects.filter(key__in=key_ids, day__gte=window_start(now)).order_by()
    sums = days.values_list("key").annotate(used=WideSum("cost_usd"), unpriced=Sum("unpriced_requests"))
    used = {key_id: (cost, int(unpriced)) for key_id, cost, unpriced in sums}
    return {key_id: Balance(granted.get(key_id, _ZERO), *used.get(key_id, (_ZERO, 0))) for key_id in key_ids}


def window_costs(key_ids: Collection[int], now: dt.datetime) -> dict[int, list[Decimal]]:
    """Return the cost of each of the last USAGE_WINDOW_DAYS days, oldest first, of each of these keys, in one query."""
    first = window_start(now)
    costs = {key_id: [_ZERO] * settings.USAGE_WINDOW_DAYS for key_id in key_ids}
    days = KeyDay.objects.filter(key__in=key_ids, day__gte=first).order_by()
    for key_id, day, cost_usd in days.values_list("key", "day", "cost_usd"):
        if (place := (day - first).days) < settings.USAGE_WINDOW_DAYS:
            costs[key_id][place] = cost_usd
    return costs


def valid_grants(grants: QuerySet[Grant], now: dt.datetime) -> QuerySet[Grant]:
    """Return those that count at that moment."""
    return grants.filter(
        Q(valid_until=None) | Q(valid_until__gt=now), Q(revoked_at=None) | Q(revoked_at__gt=now), valid_from__lte=now
    )


def grants_of_key(fingerprint: str, now: dt.datetime) -> list[Grant]:
    """Return the key's valid grants, those that end first at the front."""
    grants = valid_grants(Grant.objects.filter(key__fingerprint=fingerprint), now)
    return list(grants.order_by(F("valid_until").asc(nulls_last=True), "pk"))


def is_known_key(fingerprint: str) -> bool:
    return ApiKey.objects.filter(fingerprint=fingerprint).exists()


def usage_rows(
    fingerprint: str, start: dt.date, end: dt.date, *, behind: UsageRow | None = None, most: int | None = None
) -> Iterator[UsageRow]:
    """Yield the key's use of the days from `start` to `end`, both inclusive, oldest first; memory stays flat.

    With `behind`, only what comes after that row, and of it the first `most` rows, if a number is said.
    """
    days = _days_of(fingerprint, start, end).order_by("day", "model", "endpoint")
    if behind is not None:
        on_the_day = Q(model__gt=behind.model) | Q(model=behind.model, endpoint__gt=behind.endpoint)
        days = days.filter(Q(day__gt=behind.date) | Q(on_the_day, day=behind.date), day__gte=behind.date)
    for day in days[:most].iterator(chunk_size=1000):
        yield UsageRow(
            date=day.day,
            model=day.model,
            endpoint=day.endpoint,
            requests=day.requests,
            input_tokens=day.input_tokens + day.cache_write_tokens + day.audio_input_tokens + day.image_input_tokens,
            cached_input_tokens=(
                day.cached_input_tokens + day.cached_audio_input_tokens + day.cached_image_input_tokens
            ),
            output_tokens=day.output_tokens + day.audio_output_tokens + day.image_output_tokens,
            cost=day.cost_usd,
            unpriced_requests=day.unpriced_requests,
        )


def daily_costs(fingerprint: str, start: dt.date, end: dt.date) -> list[DailyCost]:
    """Return the key's cost by day and model, both dates inclusive, oldest first; days without cost are left out."""
    sums = _days_of(fingerprint, start, end).values_list("day", "model").annotate(total=WideSum("cost_usd"))
    return [DailyCost(day, model, total) for day, model, total in sums.order_by("day", "model") if total]


def blocked_fingerprints() -> frozenset[str]:
    """Return the fingerprints of all blocked keys: one query, for a gateway that asks every few seconds."""
    return frozenset(ApiKey.objects.filter(blocked=True).values_list("fingerprint", flat=True))


_POLICY = ("fingerprint", "policy_changed_at", "registered", "price_factor")
_LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_streams",
    "monthly_usd",
    "allowed_models",
    "allowed_networks",
)


def key_policies(since: dt.datetime | None) -> Iterator[KeyPolicy]:
    """Yield what is decided of each key that operators have decided anything of; with `since`, after that.

    One query over an index of such keys alone. Of a hundred thousand keys many may do the same: that is read once.
    """
    rows = ApiKey.objects.filter(policy_changed_at__isnull=False)
    if since is not None:
        rows = rows.filter(policy_changed_at__gt=since)
    read: dict[tuple[Any, ...], KeyLimits] = {}
    for fingerprint, changed_at, is_registered, price_factor, *own in rows.values_list(*_POLICY, *_LIMITS).iterator(
        chunk_size=2000
    ):
        columns = tuple(own)
        limits = read.get(columns)
        if limits is None:
            limits = read[columns] = _limits_of(*columns)
        yield KeyPolicy(sys.intern(fingerprint), changed_at, is_registered, price_factor, limits)


def _limits_of(
    requests: int | None, tokens: int | None, streams: int | None, usd: Decimal | None, models: str, networks: str
) -> KeyLimits:
    return KeyLimits(requests, tokens, streams, usd, read_models(models), read_networks(networks))


def has_key_limits() -> bool:
    """Return whether any key has limits of its own that must be counted."""
    counted = ("requests_per_minute", "tokens_per_minute", "concurrent_streams", "monthly_usd")
    has_any = functools.reduce(operator.or_, (Q(**{f"{name}__gt": 0}) for name in counted))
    return ApiKey.objects.filter(has_any, policy_changed_at__isnull=False).exists()


def units_spent(month: dt.date, fingerprints: Collection[str] | None = None) -> dict[str, int]:
    """Return what keys have spent in the month of a day, in tenths of a micro-dollar, by fingerprint.

    Without `fingerprints`, of all keys that have spent anything.
    """
    first = month.replace(day=1)
    days = KeyDay.objects.filter(day__gte=first, day__lt=(first + dt.timedelta(days=31)).replace(day=1)).order_by()
    if fingerprints is not None:
        days = days.filter(key__fingerprint__in=fingerprints)
    sums = days.values_list("key__fingerprint").annotate(total=WideSum("cost_usd"))
    return {sys.intern(fingerprint): usd_to_units(total) for fingerprint, total in sums.iterator(chunk_size=2000)}


def _days_of(fingerprint: str, start: dt.date, end: dt.date) -> QuerySet[UsageDay]:
    return UsageDay.objects.filter(key__fingerprint=fingerprint, day__gte=start, day__lte=end)
