"""The figures of the admin's first page: from roll-ups alone, in as many queries whatever there is."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from django.db.models import Q, QuerySet, Sum

from billing.fields import units_to_usd
from billing.models import ApiKey, KeyDay, UsageHour
from billing.rollups import TALLIES
from billing.sums import WideSum

TOP = 8
_NOTHING = units_to_usd(0)
_HOUR = dt.timedelta(hours=1)
_DAY = dt.timedelta(days=1)
_SUMS = {f"total_{name}": WideSum(name) for name in TALLIES}


@dataclass(frozen=True, slots=True)
class Period:
    """A stretch of time that ends now: its name in addresses, and how many hours or days it has."""

    name: str
    hours: int = 0
    days: int = 0


PERIODS = (Period("24h", hours=24), Period("7d", days=7), Period("90d", days=90))


@dataclass(frozen=True, slots=True)
class Total:
    """What some requests come to. Averages and shares are None where there was nothing to take them of."""

    requests: int = 0
    errors: int = 0
    unpriced_requests: int = 0
    tokens: int = 0
    cost_usd: Decimal = _NOTHING
    begun_streams: int = 0
    first_byte_ms_sum: int = 0
    proxy_us_sum: int = 0

    @classmethod
    def of(cls, row: Any) -> Total:
        counts = {name: int(row[f"total_{name}"] or 0) for name in TALLIES if name != "cost_usd"}
        return cls(cost_usd=row["total_cost_usd"] or _NOTHING, **counts)

    def __add__(self, other: Total) -> Total:
        return Total(**{name: getattr(self, name) + getattr(other, name) for name in TALLIES})

    def share(self, part: Decimal) -> Total:
        """Return that part of it, as if it had come evenly."""
        scaled = {name: round(getattr(self, name) * part) for name in TALLIES if name != "cost_usd"}
        return Total(cost_usd=self.cost_usd * part, **scaled)

    @property
    def error_rate(self) -> float | None:
        return self.errors / self.requests if self.requests else None

    @property
    def first_byte_ms(self) -> float | None:
        return self.first_byte_ms_sum / self.begun_streams if self.begun_streams else None

    @property
    def added_ms(self) -> float | None:
        return self.proxy_us_sum / 1000 / self.requests if self.requests else None


@dataclass(frozen=True, slots=True)
class Today:
    """Today until now, yesterday until the same time of day, and all of yesterday; days are UTC."""

    so_far: Total
    yesterday_so_far: Total
    yesterday: Total


@dataclass(frozen=True, slots=True)
class Point:
    """One column of a chart: when it begins, and what it comes to."""

    at: dt.datetime
    total: Total


def today(now: dt.datetime) -> Today:
    """Return today beside yesterday, in one query; of yesterday's present hour as much as has gone by of this one."""
    now = now.astimezone(dt.UTC)
    hours = _hourly(UsageHour.objects.filter(day__gte=now.date() - _DAY))
    this_hour = _start_of_hour(now)
    gone_by = Decimal((now - this_hour).seconds) / 3600
    same_hour = this_hour - _DAY
    yesterday = [(at, total) for at, total in hours.items() if at.date() < now.date()]
    return Today(
        so_far=_sum(total for at, total in hours.items() if now.date() == at.date() and at <= now),
        yesterday_so_far=_sum(total for at, total in yesterday if at < same_hour)
        + hours.get(same_hour, Total()).share(gone_by),
        yesterday=_sum(total for _, total in yesterday),
    )


def series(period: Period, now: dt.datetime) -> list[Point]:
    """Return every hour or day of the period, those without a request too, in one query."""
    now = now.astimezone(dt.UTC)
    if period.hours:
        last = _start_of_hour(now)
        times = [last - _HOUR * back for back in reversed(range(period.hours))]
        found = _hourly(UsageHour.objects.filter(since(period, now)))
    else:
        last = dt.datetime.combine(now.date(), dt.time(), dt.UTC)
        times = [last - _DAY * back for back in reversed(range(period.days))]
        rows = UsageHour.objects.filter(since(period, now)).values("day").annotate(**_SUMS).order_by()
        found = {dt.datetime.combine(row["day"], dt.time(), dt.UTC): Total.of(row) for row in rows}
    return [Point(at, found.get(at, Total())) for at in times]


def since(period: Period, now: dt.datetime) -> Q:
    """Return the condition on UsageHour for a period."""
    now = now.astimezone(dt.UTC)
    if period.hours:
        first = _start_of_hour(now) - _HOUR * (period.hours - 1)
        return Q(day__gt=first.date()) | Q(day=first.date(), hour__gte=first.hour)
    return Q(day__gte=_first_day(period, now))


def top_models(period: Period, now: dt.datetime) -> list[tuple[str, Total]]:
    """Return the models that cost most, in one query."""
    rows: Any = UsageHour.objects.filter(since(period, now)).values("model").annotate(**_SUMS)
    return [(row["model"], Total.of(row)) for row in rows.order_by("-total_cost_usd", "-total_requests")[:TOP]]


def top_keys(period: Period, now: dt.datetime) -> list[tuple[ApiKey, Total]]:
    """Return the keys that cost most, in two queries; of a period in hours, those of all its days."""
    rows: Any = KeyDay.objects.filter(day__gte=_first_day(period, now)).values("key").annotate(**_SUMS)
    found = list(rows.order_by("-total_cost_usd", "-total_requests")[:TOP])
    keys = ApiKey.objects.in_bulk([row["key"] for row in found])
    return [(keys[row["key"]], Total.of(row)) for row in found]


def unpriced_models(now: dt.datetime, *, days: int) -> list[tuple[str, int]]:
    """Return the models whose price nobody knows, and their requests of the last days, in one query."""
    first = now.astimezone(dt.UTC).date() - _DAY * (days - 1)
    rows = UsageHour.objects.filter(day__gte=first, unpriced_requests__gt=0).values_list("model")
    counted = rows.annotate(total=Sum("unpriced_requests")).order_by("-total", "model")
    return [(model, int(total)) for model, total in counted]


def _first_day(period: Period, now: dt.datetime) -> dt.date:
    now = now.astimezone(dt.UTC)
    return (now - _HOUR * (period.hours - 1)).date() if period.hours else now.date() - _DAY * (period.days - 1)


def _start_of_hour(at: dt.datetime) -> dt.datetime:
    return at.replace(minute=0, second=0, microsecond=0)


def _hourly(hours: QuerySet[UsageHour]) -> dict[dt.datetime, Total]:
    rows = hours.values("day", "hour").annotate(**_SUMS).order_by()
    return {dt.datetime.combine(row["day"], dt.time(row["hour"]), dt.UTC): Total.of(row) for row in rows}


def _sum(totals: Iterable[Total]) -> Total:
    return sum(totals, Total())
