"""Rating records anew, after a price has become known or was put right."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from django.db import connection
from django.db.models import Min, Q, QuerySet

from billing import bulk, rows
from billing.fields import usd_to_units
from billing.models import Pricing, UsageDay, UsageRecord
from billing.rating import Rater, Rating
from billing.rollups import SUMS, Group, Increments, add_to_rollups, rebuild_usage_days
from billing.transactions import in_ledger

_RECORDS_PER_CHUNK = 2_000
_RATED = ("cost_usd", "pricing", "price_source", "price_version")
_COST = SUMS.index("cost_usd")
_UNPRICED = SUMS.index("unpriced_requests")


@dataclass(frozen=True, slots=True)
class RepriceResult:
    """How many records were looked at, and how many of them cost something else now."""

    examined: int
    changed: int


def reprice(
    since: dt.datetime, *, model: str | None = None, progress: Callable[[int], None] | None = None
) -> RepriceResult:
    """Rate the records since then by the prices of their time as known now, and make their days' sums again.

    Records and sums agree at any moment, also if this is interrupted; a second run changes nothing. The key's
    factor is the one of the record. `model` is a whole name, or a prefix ending in `*`.
    """
    examined = changed = 0
    after = ""
    today = dt.datetime.now(dt.UTC).date()
    # Days before there was anything are not looked at one by one.
    first_day = UsageDay.objects.filter(day__gte=since.astimezone(dt.UTC).date()).aggregate(day=Min("day"))["day"]
    # Once all batches are in that were begun with the prices before: what they record would not be looked at below.
    rater = in_ledger(Rater, alone=True)
    while chunk := in_ledger(partial(_reprice_chunk, rater, since=since, model=model, after=after)):
        after = chunk.last_id
        examined, changed = examined + chunk.examined, changed + chunk.changed
        first_day = min(first_day or chunk.first_day, chunk.first_day)
        if progress is not None:
            progress(chunk.examined)
    if first_day is not None:
        rebuild_usage_days(first_day, today + dt.timedelta(days=1))
    return RepriceResult(examined, changed)


def records_to_reprice(since: dt.datetime, *, model: str | None = None) -> QuerySet[UsageRecord]:
    records = UsageRecord.objects.filter(started_at__gte=since)
    if model and model.endswith("*"):
        return records.filter(model__startswith=model[:-1])
    return records.filter(model=model) if model else records


@dataclass(frozen=True, slots=True)
class _Chunk:
    last_id: str
    first_day: dt.date
    examined: int
    changed: int


def _reprice_chunk(rater: Rater, *, since: dt.datetime, model: str | None, after: str) -> _Chunk | None:
    records = records_to_reprice(since, model=model).filter(Q(pk__gt=after)).order_by("pk")
    found = list(records.select_for_update(no_key=True)[:_RECORDS_PER_CHUNK])
    if not found:
        return None
    rated = [(record, _rate(rater, record)) for record in found]
    changes = [(record, rating) for record, rating in rated if _columns(record) != rating]
    _store(changes)
    add_to_rollups(_differences(changes))
    return _Chunk(found[-1].pk, min(record.day for record in found), len(found), len(changes))


def _rate(rater: Rater, record: UsageRecord) -> Rating:
    usage = rows.usage_of(record)
    return rater.rate(record, usage=usage, at=record.started_at, factor=record.price_factor)


def _columns(record: UsageRecord) -> Rating:
    units = None if record.cost_usd is None else usd_to_units(record.cost_usd)
    return Rating(units, record.pricing, record.price_source, record.price_version)


def _store(changes: list[tuple[UsageRecord, Rating]]) -> None:
    if not changes:
        return
    types = bulk.columns_of(UsageRecord)
    columns = {name: types[name] for name in ("event_id", *_RATED)}
    given = bulk.parameter(((record.pk, *rating) for record, rating in changes), columns)
    statement = (
        f"WITH rated AS ({bulk.select_rows(columns)}) UPDATE {UsageRecord._meta.db_table} AS record "  # noqa: S608
        f"SET {', '.join(f'{name} = rated.{name}' for name in _RATED)} "
        "FROM rated WHERE record.event_id = rated.event_id"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [given])


def _differences(changes: list[tuple[UsageRecord, Rating]]) -> Increments:
    increments: Increments = {}
    for record, rating in changes:
        model = rows.rolled_model(
            model=record.model,
            has_key=record.key_id is not None,
            status=record.status,
            outcome=record.outcome,
            usage_source=record.usage_source,
        )
        group = Group(record.key_id, record.day, record.started_at.astimezone(dt.UTC).hour, model, record.endpoint)
        sums = increments.setdefault(group, [0] * len(SUMS))
        before = _columns(record)
        sums[_COST] += (rating.cost_units or 0) - (before.cost_units or 0)
        sums[_UNPRICED] += (rating.pricing == Pricing.UNPRICED) - (before.pricing == Pricing.UNPRICED)
    return increments
