"""From usage events to the ledger: every event once, its key, its price and its day in the same transaction."""

from __future__ import annotations

import datetime as dt
import logging
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
from django.conf import settings
from django.db import connection

from billing import bulk, rows
from billing.events import UsageEvent
from billing.models import ApiKey, Grant, UsageRecord
from billing.rating import Rating, current_rater
from billing.rollups import QUANTITIES, SUMS, Group, Increments, add_to_rollups
from billing.rows import Entry, Kind
from billing.transactions import in_ledger

logger = logging.getLogger(__name__)

# A record's columns, in the order in which rows have them: its id; what is summed up; the rest.
COLUMNS = (
    "event_id",
    *QUANTITIES,
    "first_byte_ms",
    "proxy_us",
    "cost_usd",
    "pricing",
    "price_source",
    "price_version",
    "started_at",
    "day",
    "upstream_request_id",
    "duration_ms",
    "request_bytes",
    "response_bytes",
    "key_id",
    "price_factor",
    *Kind._fields[2:],
)
_summed_of = operator.itemgetter(slice(1, COLUMNS.index("cost_usd") + 1))
_ONE = Decimal(1)

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class RecordResult:
    """How many events were new, were there already, or cannot be recorded at all (a damaged journal).

    `sums` are those of the new ones, by the names of `billing.rollups.SUMS`; money in tenths of a micro-dollar.
    """

    recorded: int
    duplicates: int
    rejected: int
    sums: Mapping[str, int] = field(default_factory=dict, compare=False)


def record_events(events: Sequence[UsageEvent]) -> RecordResult:
    """Record each event that is not in the ledger yet, with its price, and add it to its day: all or nothing.

    A key comes into being with the first request that the upstream accepted (2xx, 3xx, or 101). Requests whose key is
    not known by then are recorded without one: neither wrong guesses nor requests that never reached the upstream
    fill the list of keys. A failure of the database is raised; the same events may then be given again.
    """
    usable, rejected = _usable(events)
    entries = list({entry.event.id: entry for entry in reversed(usable)}.values())
    sums = in_ledger(lambda: _record(entries)) if entries else {}
    recorded = sums.get("requests", 0)
    return RecordResult(recorded, len(usable) - recorded, rejected, sums)


def _usable(events: Iterable[UsageEvent]) -> tuple[list[Entry], int]:
    usable, rejected = [], 0
    intake = rows.Intake()
    for event in events:
        try:
            usable.append(intake.entry(event))
        except rows.UnusableEventError as exc:
            rejected += 1
            logger.error("a usage event was not recorded: %s", exc)
    return usable, rejected


def _record(entries: list[Entry]) -> dict[str, int]:
    by_kind: dict[Kind, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_kind[entry.kind].append(entry)
    keys = _keys(by_kind)
    found = list(_rows_by_hour(by_kind, keys))
    # In one order for every writer, so that two of them never wait for each other.
    new_ids = _insert(sorted(row for hour in found for row in hour.rows))
    increments = _increments(hour.only(new_ids) for hour in found)
    add_to_rollups(increments)
    return dict(zip(SUMS, map(sum, zip(*increments.values(), strict=True)), strict=True)) if increments else {}


# Keys


def is_accepted(kind: Kind) -> bool:
    """Return whether the upstream took the request, and so the key."""
    return kind.outcome != "refused" and (200 <= kind.status < 400 or kind.status == 101)


def _keys(by_kind: Mapping[Kind, list[Entry]]) -> dict[str, ApiKey]:
    """Return the keys that are known by now, their first and last use brought up to date."""
    used: dict[str, list[Entry]] = defaultdict(list)
    for kind, entries in by_kind.items():
        if kind.key_fingerprint and is_accepted(kind):
            used[kind.key_fingerprint] += entries
    keys = _locked({kind.key_fingerprint for kind in by_kind if kind.key_fingerprint})
    if missing := sorted(used.keys() - keys.keys()):
        made = [ApiKey(fingerprint=fingerprint, hint=_first(used[fingerprint]).key_hint) for fingerprint in missing]
        ApiKey.objects.bulk_create(made, ignore_conflicts=True)
        keys |= _locked(missing)
    _mark_used({keys[fingerprint]: [entry.started_us for entry in by_key] for fingerprint, by_key in used.items()})
    return keys


def _first(entries: Iterable[Entry]) -> UsageEvent:
    return min((entry.event for entry in entries), key=lambda event: event.id)


# The query set's own would be compiled anew for each batch.
_KEYS = {
    "sqlite": "fingerprint IN (SELECT value FROM json_each(%s)) ORDER BY id",
    "postgresql": "fingerprint IN (SELECT json_array_elements_text(%s)) ORDER BY id FOR NO KEY UPDATE",
}


def _locked(fingerprints: Iterable[str]) -> dict[str, ApiKey]:
    """Return the keys that exist, locked in one order for every writer (their rows may still be referred to)."""
    found = ApiKey.objects.raw(
        "SELECT id, fingerprint, price_factor, first_used_at, last_used_at "  # noqa: S608 - no data
        f"FROM {ApiKey._meta.db_table} WHERE {_KEYS[connection.vendor]}",
        [msgspec.json.encode(list(fingerprints)).decode()],
    )
    return {key.fingerprint: key for key in found}


def _mark_used(times_us: dict[ApiKey, list[int]]) -> None:
    changed = []
    for key, started_us in times_us.items():
        first, last = rows.as_time(min(started_us)), rows.as_time(max(started_us))
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


class HourRows(NamedTuple):
    """The rows that one group of the roll-ups sums up, of requests that all failed or all did not."""

    group: Group
    is_error: bool
    rows: list[Row]

    def only(self, ids: set[str] | None) -> HourRows:
        """Return those of these ids; None is all."""
        return self if ids is None else self._replace(rows=[row for row in self.rows if row[0] in ids])


def _rows_by_hour(by_kind: Mapping[Kind, list[Entry]], keys: Mapping[str, ApiKey]) -> Iterator[HourRows]:
    rater = current_rater()
    calendar = rows.Calendar(zone="" if connection.vendor == "sqlite" else "+00:00")
    for kind, entries in by_kind.items():
        key = keys.get(kind.key_fingerprint)
        key_id, factor = (None, _ONE) if key is None else (key.pk, key.price_factor)
        rates = rater.rates(kind, factor=factor)
        prices = rater.prices_of(kind.model)
        shared = (key_id, str(factor), *kind[2:])
        by_hour: dict[rows.Hour, list[Row]] = defaultdict(list)
        for entry in entries:
            rating = rates.rate(entry.event.usage, prices.at(entry.started_us))
            hour, *texts = calendar.names_of(entry.started_us)
            by_hour[hour].append(row_of(entry, rating, texts, shared))
        model = rows.rolled_model(
            model=kind.model,
            has_key=key is not None,
            status=kind.status,
            outcome=kind.outcome,
            usage_source=kind.usage_source,
        )
        is_error = rows.is_error(status=kind.status, outcome=kind.outcome)
        for hour, found in by_hour.items():
            yield HourRows(Group(key_id, *hour, model, kind.endpoint), is_error, found)


def row_of(entry: Entry, rating: Rating, times: Iterable[str], shared: Iterable[Any]) -> Row:
    """Return the values of COLUMNS: `times` are start and day, `shared` what begins with the key's id and factor."""
    event = entry.event
    return (
        event.id,
        *entry.quantities,
        event.first_byte_ms,
        entry.proxy_us,
        *rating,
        *times,
        event.upstream_request_id,
        event.duration_ms,
        event.request_bytes,
        event.response_bytes,
        *shared,
    )


def _insert(found: list[Row]) -> set[str] | None:
    """Insert the records that are not there yet, and return their ids; None if none was there."""
    if connection.vendor == "sqlite":
        return _insert_alone(found)
    types = bulk.columns_of(UsageRecord)
    columns = {name: types[name] for name in COLUMNS}
    statement = (
        f"INSERT INTO {UsageRecord._meta.db_table} ({', '.join(columns)}) "
        f"{bulk.select_rows(columns)} ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [bulk.parameter(found, columns)])
        return {event_id for (event_id,) in cursor.fetchall()}


def _insert_alone(found: list[Row]) -> set[str] | None:
    """Insert as the only writer, which a transaction is on SQLite: what has come since its beginning is ours.

    Rows one by one cost SQLite a fifth of what it costs it to take them out of JSON.
    """
    table = UsageRecord._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT max(rowid) FROM {table}")  # noqa: S608 - no data
        (last,) = cursor.fetchone()
        places = ", ".join("?" * len(COLUMNS))
        done = connection.connection.executemany(
            f"INSERT INTO {table} ({', '.join(COLUMNS)}) VALUES ({places}) ON CONFLICT (event_id) DO NOTHING",  # noqa: S608
            found,
        )
        if done.rowcount == len(found):
            return None
        # A new row's number is above all others: https://sqlite.org/autoinc.html
        cursor.execute(f"SELECT event_id FROM {table} WHERE rowid > %s", [last or 0])  # noqa: S608 - no data
        return {event_id for (event_id,) in cursor.fetchall()}


def _increments(hours: Iterable[HourRows]) -> Increments:
    increments: Increments = {}
    for group, is_error, found in hours:
        if not found:
            continue
        *summed, costs = zip(*map(_summed_of, found), strict=True)
        *quantities, first_byte_ms, proxy_us = map(sum, summed)
        requests, unpriced = len(found), costs.count(None)
        cost_units = sum(filter(None, costs))
        sums = [*quantities, requests, requests * is_error, unpriced, cost_units, first_byte_ms, proxy_us]
        increments[group] = list(map(operator.add, sums, increments[group])) if group in increments else sums
    return increments
