"""The sums by day, key and hour: added to with every batch of records, and made again from the records when asked."""

from __future__ import annotations

import datetime as dt
import functools
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from django.db import connection
from django.db.models import Case, CharField, Count, F, Func, Max, Model, Q, SmallIntegerField, Value, When
from django.db.models.functions import Coalesce

from billing import bulk
from billing.fields import UsdField
from billing.models import KeyDay, Pricing, Purge, Quantities, UsageDay, UsageHour, UsageRecord
from billing.sums import MOST, WideSum
from billing.transactions import in_ledger

QUANTITIES = tuple(field.name for field in Quantities._meta.get_fields())
SUMS = (
    *QUANTITIES,
    "requests",
    "errors",
    "unpriced_requests",
    "cost_usd",
    "begun_streams",
    "first_byte_ms_sum",
    "proxy_us_sum",
)
TOKENS = (
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "audio_input_tokens",
    "cached_audio_input_tokens",
    "audio_output_tokens",
    "image_input_tokens",
    "cached_image_input_tokens",
    "image_output_tokens",
)
_COPIED = ("requests", "errors", "unpriced_requests", "cost_usd", "begun_streams", "first_byte_ms_sum", "proxy_us_sum")
TALLIES = (*_COPIED, "tokens")
_TALLY_PLACES = tuple(map(SUMS.index, _COPIED))
_TOKEN_PLACES = tuple(map(SUMS.index, TOKENS))
_DAY = ("key_id", "day", "model", "endpoint")
_KEY_DAY = ("key_id", "day")
_HOUR = ("day", "hour", "model", "endpoint")


class Group(NamedTuple):
    """What the finest sums are for: those of a day, of a key and of an hour are made of them."""

    key_id: int | None
    day: dt.date
    hour: int
    model: str
    endpoint: str


# Whole numbers in the order of SUMS, money in tenths of a micro-dollar.
Increments = dict[Group, list[int]]
# The same in the order of TALLIES, for the rows of one table.
Totals = dict[tuple[Any, ...], list[int]]


def add_to_rollups(increments: Mapping[Group, list[int]]) -> None:
    """Add to the roll-ups, in one order for every writer, so that two of them never wait for each other."""
    days, key_days, hours = _folded(increments)
    with_key = sorted(item for item in days.items() if item[0][0] is not None)
    without_key = sorted(((row, sums) for row, sums in days.items() if row[0] is None), key=_by_day)
    _upsert(UsageDay, _DAY, with_key, SUMS, conflict="(key_id, day, model, endpoint) WHERE key_id IS NOT NULL")
    _upsert(UsageDay, _DAY, without_key, SUMS, conflict="(day, model, endpoint) WHERE key_id IS NULL")
    _upsert(KeyDay, _KEY_DAY, sorted(key_days.items()), TALLIES, conflict="(key_id, day)")
    # Last: every writer of the hour wants these rows, and holds them until its transaction ends.
    _upsert(UsageHour, _HOUR, sorted(hours.items()), TALLIES, conflict="(day, hour, model, endpoint)")


def _folded(increments: Mapping[Group, list[int]]) -> tuple[Totals, Totals, Totals]:
    days: Totals = {}
    key_days: Totals = {}
    hours: Totals = {}
    for group, sums in increments.items():
        key_id, day, _hour, model, endpoint = group
        _add(days, (key_id, day, model, endpoint), sums)
        tally = [sums[place] for place in _TALLY_PLACES]
        tally.append(sum(sums[place] for place in _TOKEN_PLACES))
        if key_id is not None:
            _add(key_days, (key_id, day), tally)
        _add(hours, group[1:], tally)
    return days, key_days, hours


def _add(totals: Totals, row: tuple[Any, ...], added: list[int]) -> None:
    sums = totals.get(row)
    totals[row] = list(added) if sums is None else list(map(operator.add, sums, added))


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
    for table in (UsageDay, KeyDay, UsageHour):
        table._default_manager.filter(day=day).delete()
    start = dt.datetime.combine(day, dt.time(), dt.UTC)
    found: Any = UsageRecord.objects.filter(started_at__gte=start, started_at__lt=start + dt.timedelta(days=1))
    found = found.annotate(rolled=_ROLLED_MODEL).order_by()
    by_model = found.values("key_id", "rolled", "endpoint").annotate(**_AGGREGATES)
    _insert(UsageDay, day, by_model, {"key_id": "key_id", "model": "rolled", "endpoint": "endpoint"}, SUMS)
    by_hour = found.annotate(hour_of_day=HourOf("started_at")).values("hour_of_day", "rolled", "endpoint")
    columns = {"hour": "hour_of_day", "model": "rolled", "endpoint": "endpoint"}
    _insert(UsageHour, day, by_hour.annotate(**_TALLIED), columns, TALLIES)
    days: Any = UsageDay.objects.filter(day=day, key__isnull=False).order_by()
    by_key = days.values("key_id").annotate(**_SUMMED_DAYS)
    _insert(KeyDay, day, by_key, {"key_id": "key_id"}, TALLIES)


def _insert(table: type[Model], day: dt.date, query: Any, names: Mapping[str, str], sums: Sequence[str]) -> None:
    """Insert what a query finds on a day: `names` are columns and the query's names for them."""
    found, parameters = query.query.sql_with_params()
    totals = (_at_most(f"total_{name}") for name in sums)
    statement = (
        f"INSERT INTO {table._meta.db_table} (day, {', '.join((*names, *sums))}) "  # noqa: S608 - no data
        f"SELECT %s, {', '.join((*names.values(), *totals))} FROM ({found}) AS grouped"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [connection.ops.adapt_datefield_value(day), *parameters])


def _at_most(amount: str) -> str:
    """Return the SQL of an amount that is MOST at most: no batch may fail since a sum is too large to be kept."""
    return f"{'min' if connection.vendor == 'sqlite' else 'LEAST'}({amount}, {MOST})"


class HourOf(Func):
    """The hour of a time, in UTC; Django's own calls Python for each row on SQLite."""

    output_field = SmallIntegerField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, template="CAST(substr(%(expressions)s, 12, 2) AS INTEGER)")

    def as_postgresql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        template = "CAST(EXTRACT(HOUR FROM %(expressions)s AT TIME ZONE 'UTC') AS SMALLINT)"
        return self.as_sql(compiler, connection, template=template)


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
# What comes as a whole begins when it is done, and what failed before its first byte (0) not at all.
_HAS_BEGUN = Q(is_stream=True, first_byte_ms__gt=0)
# In the order of SUMS, under names that no column has.
_AGGREGATES: dict[str, Any] = {
    **{f"total_{name}": WideSum(name) for name in QUANTITIES},
    "total_requests": Count("pk"),
    "total_errors": Count("pk", filter=_IS_ERROR),
    "total_unpriced_requests": Count("pk", filter=Q(pricing=Pricing.UNPRICED)),
    "total_cost_usd": Coalesce(WideSum("cost_usd"), Value(0, output_field=UsdField())),
    "total_begun_streams": Count("pk", filter=_HAS_BEGUN),
    "total_first_byte_ms_sum": WideSum(Case(When(_HAS_BEGUN, then="first_byte_ms"), default=0)),
    "total_proxy_us_sum": WideSum("proxy_us"),
}
_TOKENS: Any = WideSum(functools.reduce(operator.add, map(F, TOKENS)))
_TALLIED: dict[str, Any] = {f"total_{name}": _AGGREGATES[f"total_{name}"] for name in _COPIED}
_TALLIED["total_tokens"] = _TOKENS
_SUMMED_DAYS: dict[str, Any] = {f"total_{name}": WideSum(name) for name in _COPIED}
_SUMMED_DAYS["total_tokens"] = _TOKENS


def _by_day(item: tuple[tuple[Any, ...], list[int]]) -> tuple[Any, ...]:
    return item[0][1:]


def _upsert(
    model: type[Model],
    names: Sequence[str],
    items: list[tuple[tuple[Any, ...], list[int]]],
    sums: Sequence[str],
    *,
    conflict: str,
) -> None:
    if not items:
        return
    columns, statement = _upsert_statement(model, tuple(names), tuple(sums), conflict)
    fitting = ((*row, *(max(-MOST, min(amount, MOST)) for amount in amounts)) for row, amounts in items)
    bulk.execute(statement, bulk.parameter(fitting, columns))


@functools.cache
def _upsert_statement(
    model: type[Model], names: tuple[str, ...], sums: tuple[str, ...], conflict: str
) -> tuple[Mapping[str, str], str]:
    table = model._meta.db_table
    types = bulk.columns_of(model)
    columns = {name: types[name] for name in (*names, *sums)}
    # A row that was there before sums had a bound may hold more than can be added to.
    kept = {name: _at_most(f"{table}.{name}") for name in sums}
    added = ", ".join(f"{name} = {_at_most(f'{before} + excluded.{name}')}" for name, before in kept.items())
    return columns, (
        f"INSERT INTO {table} ({', '.join(columns)}) {bulk.select_rows(columns)} "
        f"ON CONFLICT {conflict} DO UPDATE SET {added}"
    )
