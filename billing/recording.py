"""From usage events to the ledger: every event once, its key, its price and its day in the same transaction."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
from django.conf import settings
from django.db import connection
from msgspec.structs import astuple

from billing import bulk, rows
from billing.events import Usage, UsageEvent
from billing.models import ApiKey, Grant, UsageRecord
from billing.rating import Labels, PricesOfModel, Rater, RatesAtPrice, current_rater
from billing.rollups import QUANTITIES, SUMS, Group, Increments, add_to_rollups
from billing.rows import Kind
from billing.transactions import give_up_waiting_after, in_ledger

logger = logging.getLogger(__name__)

# Of most usages all other quantities are 0.
_TEXT = 5
# A row's own columns: `event_id`, the quantities, all or those of text, and these.
_OWN = (
    "first_byte_ms",
    "proxy_us",
    "cost_usd",
    "started_at",
    "upstream_request_id",
    "duration_ms",
    "request_bytes",
    "response_bytes",
)
# What all rows of a sheet have in common.
_SHARED = ("key_id", "price_factor", *Kind._fields[2:], "day", *Labels._fields)
COLUMNS = ("event_id", *QUANTITIES, *_OWN, *_SHARED)
# SQLite before 3.32 takes 999 parameters: https://sqlite.org/limits.html
_PARAMETERS_MAX = 999
_ROWS_AT_ONCE = (64, 16, 4, 1)
_COST = -len(_OWN) + _OWN.index("cost_usd")
_ONE = Decimal(1)
# A batch that waits holds its keys' rows, and so whoever would block one of them in the admin.
_LOCKED_MOST_S = 10.0
_rounded: Callable[[float], int] = float.__round__  # a third of what round() takes to find it

Row = tuple[Any, ...]
ByKind = Mapping[Any, list[UsageEvent]]  # by Kind


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
    intake, rejected = _taken(events)
    sums = in_ledger(lambda: _record(intake.by_kind)) if intake.by_kind else {}
    recorded = sums.get("requests", 0)
    return RecordResult(recorded, len(events) - rejected - recorded, rejected, sums)


def _taken(events: Iterable[UsageEvent]) -> tuple[rows.Intake, int]:
    intake, rejected = rows.Intake(), 0
    for event in events:
        try:
            intake.take(event)
        except rows.UnusableEventError as exc:
            rejected += 1
            logger.error("a usage event was not recorded: %s", exc)
    return intake, rejected


def _record(by_kind: ByKind) -> dict[str, int]:
    give_up_waiting_after(_LOCKED_MOST_S)
    found = sheets(by_kind, _keys(by_kind), current_rater())
    new_ids = _insert(found)
    increments = _increments(found if new_ids is None else (sheet.only(new_ids) for sheet in found))
    add_to_rollups(increments)
    return dict(zip(SUMS, map(sum, zip(*increments.values(), strict=True)), strict=True)) if increments else {}


# Keys


def is_accepted(kind: Kind) -> bool:
    """Return whether the upstream took the request, and so the key. What allows CORS asks nobody for a key."""
    was_asked = kind.outcome != "refused" and kind.method != "OPTIONS"
    return was_asked and (200 <= kind.status < 300 or kind.status == 101)


def _keys(by_kind: ByKind) -> dict[str, ApiKey]:
    """Return the keys that are known by now, their first and last use brought up to date."""
    used: dict[str, list[UsageEvent]] = defaultdict(list)
    for kind, events in by_kind.items():
        if kind.key_fingerprint and is_accepted(kind):
            used[kind.key_fingerprint] += events
    keys = _locked({kind.key_fingerprint for kind in by_kind if kind.key_fingerprint})
    if missing := sorted(used.keys() - keys.keys()):
        made = [ApiKey(fingerprint=fingerprint, hint=_first(used[fingerprint]).key_hint) for fingerprint in missing]
        ApiKey.objects.bulk_create(made, ignore_conflicts=True)
        keys |= _locked(missing)
    _mark_used({keys[fingerprint]: [event.started_at for event in by_key] for fingerprint, by_key in used.items()})
    return keys


def _first(events: Iterable[UsageEvent]) -> UsageEvent:
    return min(events, key=lambda event: event.id)


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


def _mark_used(times_s: dict[ApiKey, list[float]]) -> None:
    changed = []
    for key, started_at in times_s.items():
        first, last = (rows.as_time(round(at * 1e6)) for at in (min(started_at), max(started_at)))
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


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows that differ in their own columns only: of one group of the roll-ups, failed or not, streams or not.

    `shared` is what they have in common, in the order of _SHARED.
    """

    group: Group
    is_error: bool
    is_stream: bool
    shared: Row
    rows: list[Row]

    @property
    def own(self) -> tuple[str, ...]:
        """The columns of `rows`; what is in none of them and not shared is 0."""
        return ("event_id", *QUANTITIES[: len(self.rows[0]) - 1 - len(_OWN)], *_OWN)

    def columns(self, place: int) -> dict[str, Any]:
        """Return a row's values by their columns."""
        names, values = (*self.own, *_SHARED), (*self.rows[place], *self.shared)
        return dict(zip(names, values, strict=True))

    def only(self, ids: set[str]) -> Sheet:
        """Return those of these ids."""
        return replace(self, rows=[row for row in self.rows if row[0] in ids])


def sheets(by_kind: ByKind, keys: Mapping[str, ApiKey], rater: Rater) -> list[Sheet]:
    """Return the rows of events that fit, with their prices and their keys, as far as these are known."""
    calendar = rows.Calendar()
    prices: dict[str, PricesOfModel] = {}
    found: list[Sheet] = []
    for kind, events in by_kind.items():
        if kind.model not in prices:
            prices[kind.model] = rater.prices_of(kind.model)
        writer = _Writer(kind, keys.get(kind.key_fingerprint), rater, prices=prices[kind.model])
        writer.write(events, calendar=calendar)
        found += writer.sheets
    return found


class _Moment(NamedTuple):
    """What the events of one kind in one second have in common."""

    second: rows.Second
    text: str  # how their times begin
    rates: RatesAtPrice | None  # None if their price changes within the second
    sheets: dict[tuple[Row, int], Sheet]  # those of the second's hour, by labels and number of quantities


class _Writer:
    """Writes the events of one kind into sheets."""

    def __init__(self, kind: Kind, key: ApiKey | None, rater: Rater, *, prices: PricesOfModel) -> None:
        self.sheets: list[Sheet] = []
        self._kind = kind
        self._key_id: int | None = None if key is None else key.pk
        factor = _ONE if key is None else key.price_factor
        self._prices = prices
        self._rates = rater.rates(kind, factor=factor)
        self._shared = (self._key_id, str(factor), *kind[2:])
        self._hours: dict[tuple[dt.date, int], dict[tuple[Row, int], Sheet]] = {}

    def write(self, events: Iterable[UsageEvent], *, calendar: rows.Calendar) -> None:
        zone = "" if connection.vendor == "sqlite" else "+00:00"
        moments: dict[str, _Moment] = {}
        for event in events:
            started_us = _rounded(event.started_at * 1e6)
            digits = str(started_us)
            fraction = digits[-6:]
            moment = moments.get(digits[:-6])
            if moment is None:
                moment = moments[digits[:-6]] = self._moment(calendar.second(int(digits[:-6])))
            second, text, rates, known = moment
            if rates is None:
                rates = self._rates.at(self._prices.at(started_us))
            quantities, units, labels = self._rated(event.usage, rates)
            sheet = known.get((labels, len(quantities)))
            if sheet is None:
                sheet = known[labels, len(quantities)] = self._new_sheet(second, labels)
            milliseconds = event.proxy_ms
            microseconds = _rounded(milliseconds * 1e3)
            if microseconds / 1e3 != milliseconds:
                microseconds = rows.in_microseconds(milliseconds)
            sheet.rows.append(
                (
                    event.id,
                    *quantities,
                    event.first_byte_ms,
                    microseconds,
                    units,
                    f"{text}.{fraction}{zone}" if fraction != "000000" else text + zone,
                    event.upstream_request_id,
                    event.duration_ms,
                    event.request_bytes,
                    event.response_bytes,
                )
            )

    def _moment(self, second: rows.Second) -> _Moment:
        found, is_steady = self._prices.during(second.number)
        rates = self._rates.at(found) if is_steady else None
        return _Moment(second, second.text, rates, self._hours.setdefault((second.day, second.hour), {}))

    def _rated(self, usage: Usage, rates: RatesAtPrice) -> tuple[Row, int | None, Row]:
        """Return the quantities, all or those of text; the cost in units; and the labels."""
        counts = astuple(usage)
        if any(counts[_TEXT:]):
            quantities = (*counts[:-1], round(usage.seconds * 1000))
            units = None if rates.tariff is None else rates.tariff.units_of(usage)
        elif any(quantities := counts[:_TEXT]):
            units = None if rates.tariff is None else rates.tariff.units_of_text(usage, quantities)
        else:
            return quantities, rates.without_usage[0], rates.without_usage[1:]
        return quantities, units, rates.unpriced if units is None else rates.priced

    def _new_sheet(self, second: rows.Second, labels: Row) -> Sheet:
        kind = self._kind
        model = rows.rolled_model(
            model=kind.model,
            has_key=self._key_id is not None,
            status=kind.status,
            outcome=kind.outcome,
            usage_source=kind.usage_source,
        )
        group = Group(self._key_id, second.day, second.hour, model, kind.endpoint)
        is_error = rows.is_error(status=kind.status, outcome=kind.outcome)
        sheet = Sheet(group, is_error, kind.is_stream, (*self._shared, second.day_text, *labels), [])
        self.sheets.append(sheet)
        return sheet


def _insert(found: list[Sheet]) -> set[str] | None:
    """Insert the records that are not there yet, and return their ids; None if none was there."""
    if connection.vendor == "sqlite":
        return _insert_alone(found)
    given = [
        dict(zip((*sheet.own, "sheet"), (*row, n), strict=True)) for n, sheet in enumerate(found) for row in sheet.rows
    ]
    shared = [dict(zip((*_SHARED, "sheet"), (*sheet.shared, n), strict=True)) for n, sheet in enumerate(found)]
    with connection.cursor() as cursor:
        cursor.execute(_insert_statement(), [bulk.encoded(given), bulk.encoded(shared)])
        return {event_id for (event_id,) in cursor.fetchall()}


@functools.cache
def _insert_statement() -> str:
    """Return PostgreSQL's statement: rows and what they share are two parameters, joined by the sheets' numbers.

    In one order for every writer, so that two of them never wait for each other.
    """
    types = {**bulk.columns_of(UsageRecord), "sheet": "integer"}
    own = ", ".join(f"{name} {types[name]}" for name in ("event_id", *QUANTITIES, *_OWN, "sheet"))
    shared = ", ".join(f"{name} {types[name]}" for name in (*_SHARED, "sheet"))
    values = (f"coalesce({name}, 0)" if name in QUANTITIES else name for name in COLUMNS)
    return (
        f"INSERT INTO {UsageRecord._meta.db_table} ({', '.join(COLUMNS)}) SELECT {', '.join(values)} "  # noqa: S608 - no data
        f"FROM json_to_recordset(%s) AS given ({own}) JOIN json_to_recordset(%s) AS shared ({shared}) USING (sheet) "
        "ORDER BY event_id ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
    )


def _insert_alone(found: list[Sheet]) -> set[str] | None:
    """Insert as the only writer, which a transaction is on SQLite: what has come since its beginning is ours."""
    table = UsageRecord._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT max(rowid) FROM {table}")  # noqa: S608 - no data
        (last,) = cursor.fetchone()
        with connection.wrap_database_errors:
            inserted = sum(_insert_sheet(sheet) for sheet in found)
        if inserted == sum(len(sheet.rows) for sheet in found):
            return None
        # A new row's number is above all others: https://sqlite.org/autoinc.html
        cursor.execute(f"SELECT event_id FROM {table} WHERE rowid > %s", [last or 0])  # noqa: S608 - no data
        return {event_id for (event_id,) in cursor.fetchall()}


def _insert_sheet(sheet: Sheet) -> int:
    """Insert rows many at a time, with what they share once; return how many were not there.

    To bind a value takes SQLite and Python longer than to store it, and to begin a statement as long as a row.
    """
    inserted = done = 0
    execute = connection.connection.execute
    for size in _ROWS_AT_ONCE:
        if size * len(sheet.rows[0]) > _PARAMETERS_MAX - len(_SHARED):
            continue
        statement = _values_statement(sheet.own, size)
        while len(sheet.rows) - done >= size:
            chunk = sheet.rows[done : done + size]
            inserted += execute(statement, [*sheet.shared, *itertools.chain.from_iterable(chunk)]).rowcount
            done += size
    return inserted


@functools.cache
def _values_statement(own: tuple[str, ...], rows_count: int) -> str:
    """Return SQLite's statement: its parameters are those of _SHARED, then those of each row."""
    shared = [f"?{number}" for number in range(1, len(_SHARED) + 1)]
    zeros = [name for name in QUANTITIES if name not in own]
    values = []
    for first in range(len(shared) + 1, len(shared) + 1 + rows_count * len(own), len(own)):
        row = (*shared, *(f"?{number}" for number in range(first, first + len(own))), *("0" for _ in zeros))
        values.append(f"({', '.join(row)})")
    return (
        f"INSERT INTO {UsageRecord._meta.db_table} ({', '.join((*_SHARED, *own, *zeros))}) "  # noqa: S608 - no data
        f"VALUES {', '.join(values)} ON CONFLICT (event_id) DO NOTHING"
    )


def _increments(found: Iterable[Sheet]) -> Increments:
    increments: Increments = {}
    for sheet in found:
        if not sheet.rows:
            continue
        _ids, *columns = zip(*sheet.rows, strict=True)
        *quantities, first_byte_ms, proxy_us, costs = columns[: _COST + 1]
        sums = list(map(sum, quantities))
        sums += [0] * (len(QUANTITIES) - len(sums))
        requests, unpriced = len(costs), costs.count(None)
        sums += [requests, requests * sheet.is_error, unpriced, sum(filter(None, costs))]
        sums += [requests - first_byte_ms.count(0), sum(first_byte_ms)] if sheet.is_stream else [0, 0]
        sums.append(sum(proxy_us))
        known = increments.get(sheet.group)
        increments[sheet.group] = sums if known is None else list(map(operator.add, sums, known))
    return increments
