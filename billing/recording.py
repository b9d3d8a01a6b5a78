"""From usage events to the ledger: every event once, its key, its price and its day in the same transaction."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import msgspec
from django.conf import settings
from django.db import connection

from billing import bulk, rows
from billing.events import UsageEvent
from billing.models import ApiKey, Grant, Pricing, UsageRecord
from billing.rating import UNPRICED, Rater, Rating
from billing.rollups import QUANTITIES, SUMS, Group, Increments, add_to_rollups
from billing.transactions import in_ledger

logger = logging.getLogger(__name__)

_ONE = Decimal(1)


# In the order in which `values_of` has them.
_VALUES = (
    *QUANTITIES,
    "event_id",
    "key_id",
    "started_at",
    "day",
    "endpoint",
    "method",
    "model",
    "service_tier",
    "is_batch",
    "is_stream",
    "status",
    "outcome",
    "usage_source",
    "upstream_request_id",
    "first_byte_ms",
    "duration_ms",
    "proxy_us",
    "request_bytes",
    "response_bytes",
    "cost_usd",
    "pricing",
    "price_source",
    "price_version",
    "price_factor",
)


@dataclass(frozen=True, slots=True)
class RecordResult:
    """How many events were new, were there already, or cannot be recorded at all (a damaged journal).

    `sums` are those of the new ones, by the names of `billing.rollups.SUMS`; money in tenths of a micro-dollar.
    """

    recorded: int
    duplicates: int
    rejected: int
    sums: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class Entry:
    """One event on its way into the ledger."""

    event: UsageEvent
    started_at: dt.datetime
    key_id: int | None = None
    factor: Decimal = _ONE
    rating: Rating = UNPRICED


def record_events(events: Sequence[UsageEvent]) -> RecordResult:
    """Record each event that is not in the ledger yet, with its price, and add it to its day: all or nothing.

    A key comes into being with the first request that the upstream accepted (2xx, 3xx, or 101). Requests whose key is
    not known by then are recorded without one: neither wrong guesses nor requests that never reached the upstream
    fill the list of keys. A failure of the database is raised; the same events may then be given again.
    """
    usable, rejected = _usable(events)
    entries = list({event.id: event for event in reversed(usable)}.values())
    prepared = [Entry(event, rows.started_at(event)) for event in sorted(entries, key=lambda event: event.id)]
    sums = in_ledger(lambda: _record(prepared)) if prepared else {}
    recorded = sums.get("requests", 0)
    return RecordResult(recorded, len(usable) - recorded, rejected, sums)


def _usable(events: Iterable[UsageEvent]) -> tuple[list[UsageEvent], int]:
    usable, rejected = [], 0
    for event in events:
        try:
            usable.append(rows.storable(event))
        except rows.UnusableEventError as exc:
            rejected += 1
            logger.error("a usage event was not recorded: %s", exc)
    return usable, rejected


def _record(entries: list[Entry]) -> dict[str, int]:
    _attach_keys(entries)
    rater = Rater()
    for entry in entries:
        entry.rating = rater.rate(entry.event, usage=entry.event.usage, at=entry.started_at, factor=entry.factor)
    new_ids = _insert(entries)
    increments = _increments(entry for entry in entries if entry.event.id in new_ids)
    add_to_rollups(increments)
    return dict(zip(SUMS, map(sum, zip(*increments.values(), strict=True)), strict=True)) if increments else {}


# Keys


def is_accepted(event: UsageEvent) -> bool:
    """Return whether the upstream took the request, and so the key."""
    return event.outcome != "refused" and (200 <= event.status < 400 or event.status == 101)


def _attach_keys(entries: list[Entry]) -> None:
    used: dict[str, list[Entry]] = {}
    seen = set()
    for entry in entries:
        if entry.event.key_fingerprint:
            seen.add(entry.event.key_fingerprint)
            if is_accepted(entry.event):
                used.setdefault(entry.event.key_fingerprint, []).append(entry)
    keys = _locked(seen)
    if missing := sorted(used.keys() - keys.keys()):
        hints = {fingerprint: used[fingerprint][0].event.key_hint for fingerprint in missing}
        made = [ApiKey(fingerprint=fingerprint, hint=hints[fingerprint]) for fingerprint in missing]
        ApiKey.objects.bulk_create(made, ignore_conflicts=True)
        keys |= _locked(missing)
    _mark_used({keys[fingerprint]: [entry.started_at for entry in by_key] for fingerprint, by_key in used.items()})
    for entry in entries:
        if key := keys.get(entry.event.key_fingerprint):
            entry.key_id, entry.factor = key.pk, key.price_factor


def _locked(fingerprints: Iterable[str]) -> dict[str, ApiKey]:
    """Return the keys that exist, locked in one order for every writer (their rows may still be referred to)."""
    found = ApiKey.objects.filter(fingerprint__in=list(fingerprints)).order_by("pk").select_for_update(no_key=True)
    return {key.fingerprint: key for key in found}


def _mark_used(times: dict[ApiKey, list[dt.datetime]]) -> None:
    changed = []
    for key, started in times.items():
        first, last = min(started), max(started)
        if key.first_used_at is None:
            _give_default_grant(key, first)
        marks = (min(key.first_used_at or first, first), max(key.last_used_at or last, last))
        if marks != (key.first_used_at, key.last_used_at):
            changed.append((*map(connection.ops.adapt_datetimefield_value, marks), key.pk))
    if changed:
        with connection.cursor() as cursor:
            cursor.executemany(
                f"UPDATE {ApiKey._meta.db_table} SET first_used_at = %s, last_used_at = %s WHERE id = %s",  # noqa: S608
                changed,
            )


def _give_default_grant(key: ApiKey, first_used_at: dt.datetime) -> None:
    """Give the first grant, while the key's row is locked: exactly once, however many workers see it first."""
    if settings.DEFAULT_GRANT_USD:
        Grant.objects.create(
            key=key, amount_usd=settings.DEFAULT_GRANT_USD, reason="first use", valid_from=first_used_at
        )


# Records


def _insert(entries: list[Entry]) -> set[str]:
    """Insert the records that are not there yet, and return their ids."""
    columns = bulk.columns_of(UsageRecord)
    names = tuple(columns)
    if connection.vendor == "sqlite":
        return _insert_alone(entries, names)
    given = bulk.parameter((values_of(entry, names) for entry in entries), columns)
    statement = (
        f"INSERT INTO {UsageRecord._meta.db_table} ({', '.join(columns)}) "
        f"{bulk.select_rows(columns)} ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [given])
        return {event_id for (event_id,) in cursor.fetchall()}


def _insert_alone(entries: list[Entry], names: tuple[str, ...]) -> set[str]:
    """Insert as the only writer, which a transaction is on SQLite: what is not there now is not there later.

    Rows one by one cost SQLite a fifth of what it costs it to take them out of JSON.
    """
    table = UsageRecord._meta.db_table
    ids = msgspec.json.encode([entry.event.id for entry in entries]).decode()
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT event_id FROM {table} WHERE event_id IN (SELECT value FROM json_each(%s))", [ids])  # noqa: S608
        present = {event_id for (event_id,) in cursor.fetchall()}
        new = [entry for entry in entries if entry.event.id not in present]
        rows = [values_of(entry, names, as_text=True) for entry in new]
        places = ", ".join(["?"] * len(names))
        statement = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({places})"  # noqa: S608
        connection.connection.executemany(statement, rows)
    return {entry.event.id for entry in new}


def values_of(entry: Entry, columns: tuple[str, ...], *, as_text: bool = False) -> tuple[Any, ...]:
    """Return what the record of an event holds, in the order of `columns`; dates and decimals as SQLite keeps them."""
    event, rating = entry.event, entry.rating
    at: Any = entry.started_at
    day: Any = at.date()
    factor: Any = entry.factor
    if as_text:
        at, day, factor = str(at.replace(tzinfo=None)), day.isoformat(), str(factor)
    values = (
        *rows.quantities(event.usage),
        event.id,
        entry.key_id,
        at,
        day,
        event.endpoint,
        event.method,
        event.model,
        event.service_tier,
        event.is_batch,
        event.is_stream,
        event.status,
        event.outcome,
        event.usage_source,
        event.upstream_request_id,
        event.first_byte_ms,
        event.duration_ms,
        round(event.proxy_ms * 1000),
        event.request_bytes,
        event.response_bytes,
        rating.cost_units,
        rating.pricing.value,
        rating.price_source,
        rating.price_version,
        factor,
    )
    return _in_order_of(columns)(values)


@functools.cache
def _in_order_of(columns: tuple[str, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return operator.itemgetter(*map(_VALUES.index, columns))


def _increments(entries: Iterable[Entry]) -> Increments:
    added: dict[Group, list[tuple[int, ...]]] = {}
    for entry in entries:
        event, rating, at = entry.event, entry.rating, entry.started_at
        model = rows.rolled_model(
            model=event.model,
            has_key=entry.key_id is not None,
            status=event.status,
            outcome=event.outcome,
            usage_source=event.usage_source,
        )
        amounts = (
            *rows.quantities(event.usage),
            1,
            rows.is_error(status=event.status, outcome=event.outcome),
            rating.pricing is Pricing.UNPRICED,
            rating.cost_units or 0,
            event.first_byte_ms,
            round(event.proxy_ms * 1000),
        )
        group = Group(entry.key_id, at.date(), at.hour, model, event.endpoint)
        added.setdefault(group, []).append(amounts)
    return {group: list(map(sum, zip(*amounts, strict=True))) for group, amounts in added.items()}
