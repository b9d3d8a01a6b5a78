"""The sums by the day: added to with every batch of records, and made again from the records when asked."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from django.db import connection
from django.db.models import Case, CharField, Count, F, Max, Q, Sum, Value, When
from django.db.models.functions import Coalesce

from billing import bulk
from billing.fields import UsdField
from billing.models import Pricing, Purge, Quantities, UsageDay, UsageRecord
from billing.transactions import in_ledger

QUANTITIES = tuple(field.name for field in Quantities._meta.get_fields())
SUMS = (
    *QUANTITIES,
    "requests",
    "errors",
    "unpriced_requests",
    "cost_usd",
    "first_byte_ms_sum",
    "proxy_us_sum",
)


class DayKey(NamedTuple):
    key_id: int | None
    day: dt.date
    model: str
    endpoint: str


# Whole numbers in the order of SUMS, money in tenths of a micro-dollar.
Increments = dict[DayKey, list[int]]


def add_to_days(increments: Mapping[DayKey, list[int]]) -> None:
    """Add to the roll-ups, in one order for every writer, so that two of them never wait for each other."""
    with_key = sorted(item for item in increments.items() if item[0].key_id is not None)
    without_key = sorted(((key, sums) for key, sums in increments.items() if key.key_id is None), key=_by_day)
    _upsert(with_key, conflict="(key_id, day, model, endpoint) WHERE key_id IS NOT NULL")
    _upsert(without_key, conflict="(day, model, endpoint) WHERE key_id IS NULL")


def rebuild_usage_days(start: dt.date, end: dt.date) -> int:
    """Make the roll-ups of the days from `start` to `end`, both inclusive, again from the records.

    Returns how many days that were. Days whose records retention has taken are left as they are.
    """
    first = max(start, retained_since() or start)
    days = [first + dt.timedelta(days=n) for n in range((end - first).days + 1)]
    for day in days:
        in_ledger(partial(_rebuild_day, day), alone=True)
    return len(days)


def retained_since() -> dt.date | None:
    """Return the first day whose records are all there, None if none were ever purged."""
    before: dt.date | None = Purge.objects.aggregate(before=Max("before"))["before"]
    return before


def _rebuild_day(day: dt.date) -> None:
    since = retained_since()
    if since is not None and day < since:
        return  # purged since the caller looked
    UsageDay.objects.filter(day=day).delete()
    start = dt.datetime.combine(day, dt.time(), dt.UTC)
    records = UsageRecord.objects.filter(started_at__gte=start, started_at__lt=start + dt.timedelta(days=1))
    by_key: Any = records.annotate(rolled=_ROLLED_MODEL).values("key_id", "rolled", "endpoint").order_by()
    grouped, parameters = by_key.annotate(**_AGGREGATES).query.sql_with_params()
    statement = (
        f"INSERT INTO {UsageDay._meta.db_table} (day, key_id, model, endpoint, {', '.join(SUMS)}) "  # noqa: S608 - no data
        f"SELECT %s, key_id, rolled, endpoint, {', '.join(_AGGREGATES)} FROM ({grouped}) AS grouped"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [connection.ops.adapt_datefield_value(day), *parameters])


# The same as rows.rolled_model, for the database.
_ROLLED_MODEL = Case(
    When(key=None, then=Value("")),
    When(
        Q(usage_source="none")
        & (Q(status=0) | Q(outcome="refused") | (Q(status__gte=400) & Q(status__lt=500) & ~Q(status=429))),
        then=Value(""),
    ),
    default=F("model"),
    output_field=CharField(),
)
# The same as rows.is_error.
_IS_ERROR = Q(status__gte=400) | Q(outcome__in=["upstream_error", "timeout", "refused"])
# In the order of SUMS, under names that no column has.
_AGGREGATES: dict[str, Any] = {
    **{f"total_{name}": Sum(name) for name in QUANTITIES},
    "total_requests": Count("pk"),
    "total_errors": Count("pk", filter=_IS_ERROR),
    "total_unpriced_requests": Count("pk", filter=Q(pricing=Pricing.UNPRICED)),
    "total_cost_usd": Coalesce(Sum("cost_usd"), Value(0, output_field=UsdField())),
    "total_first_byte_ms_sum": Sum("first_byte_ms"),
    "total_proxy_us_sum": Sum("proxy_us"),
}


def _by_day(item: tuple[DayKey, list[int]]) -> tuple[dt.date, str, str]:
    return item[0][1:]


def _upsert(items: list[tuple[DayKey, list[int]]], *, conflict: str) -> None:
    if not items:
        return
    table = UsageDay._meta.db_table
    types = bulk.columns_of(UsageDay)
    columns = {name: types[name] for name in (*DayKey._fields, *SUMS)}
    added = ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in SUMS)
    statement = (
        f"INSERT INTO {table} ({', '.join(columns)}) {bulk.select_rows(columns)} "
        f"ON CONFLICT {conflict} DO UPDATE SET {added}"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [bulk.parameter(((*key, *sums) for key, sums in items), columns)])
