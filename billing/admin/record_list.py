"""Pages of usage records that take as long for the millionth record as for the first, and never a COUNT."""

from __future__ import annotations

import datetime as dt
import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.paginator import Paginator
from django.db.models import Q, QuerySet, Sum
from django.http import HttpRequest
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from billing.admin.base import PreparedList
from billing.models import KeyDay, UsageHour, UsageRecord

BEFORE = "before"
_SEPARATOR = "~"
_HOUR = dt.timedelta(hours=1)
_MICROSECOND = dt.timedelta(microseconds=1)
# A page looks through stretches of time that hold about as many records, until it is full or has tried often enough.
_RECORDS_PER_STRETCH = 2000
_FIRST_PAGES = 3
_TRIES = 4
_WIDER = 4
_MOST_HOURS = 500


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page ends: the time and the id of its last record. Without an id, a moment before which to look."""

    at: dt.datetime
    pk: str = ""

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """Return what stands in an address, None if that is no cursor."""
        time, _, pk = text.partition(_SEPARATOR)
        try:
            at = parse_datetime(time)
            return None if at is None or at.tzinfo is None else cls(at.astimezone(dt.UTC), pk[:64])
        except (ValueError, OverflowError):
            return None

    def __str__(self) -> str:
        return f"{self.at.isoformat()}{_SEPARATOR}{self.pk}"

    def condition(self) -> Q:
        """Return what holds for the records behind it; the first part is for indexes."""
        if not self.pk:
            return Q(started_at__lt=self.at)
        return Q(started_at__lte=self.at) & (Q(started_at__lt=self.at) | Q(pk__lt=self.pk))


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time from `first` until before `end`, and how many of the records looked for it may hold."""

    first: dt.datetime
    end: dt.datetime
    expected: float


# When it begins, its requests, and how many of them may be what is looked for.
Hour = tuple[dt.datetime, int, float]


class OnePage(Paginator):  # type: ignore[type-arg]  # cannot be subscripted when it runs
    """Stands where templates look for a paginator; the pages are `RecordList`'s own."""

    template_name = "admin/pagination_keyset.html"
    count = 0


class RecordList(PreparedList):
    """A page that begins behind the record which the address names, newest first.

    Where no index of the records has what is looked for, the roll-ups say in which hours it is: only there the
    records are read, so that neither a rare model nor a busy hour makes a page slow.
    """

    before: Cursor | None
    older_url = ""
    looked_back_to: dt.datetime | None = None

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        given: Any = request.GET.copy()
        self.before = Cursor.parse(given.pop(BEFORE, [""])[-1])
        request.GET = given  # or every link of the page would carry it
        super().__init__(request, *args, **kwargs)

    @property
    def newest_url(self) -> str:
        return self.get_query_string()

    def read_page(self, request: HttpRequest) -> None:
        records: QuerySet[UsageRecord] = self.queryset
        if self.before is not None:
            records = records.filter(self.before.condition())
        wanted, keys = self._wanted(), self.model_admin.keys_in(self.params)
        # Of no key is what an event's id names, or nothing.
        if [] in keys or (not wanted and self.model_admin.has_own_index(self.params, keys)):
            found = list(records[: self.list_per_page + 1])
        else:
            of_keys = functools.reduce(operator.and_, (Q(key__in=some) for some in keys), Q())
            found = self._found_by_hours(records.filter(of_keys), self._hours(wanted, of_keys))
        if len(found) > self.list_per_page:
            last = found[self.list_per_page - 1]
            self.older_url = self.get_query_string({BEFORE: str(Cursor(last.started_at, last.pk))})
        self.result_list: Any = found[: self.list_per_page]
        self.result_count = self.full_result_count = len(self.result_list)
        self.show_full_result_count = self.show_admin_actions = False
        self.can_show_all = self.multi_page = False
        self.paginator: Any = OnePage([], self.list_per_page)
        self.model_admin.prepare_rows(self.result_list)

    def _wanted(self) -> dict[str, str]:
        return {name: self.params[name] for name in ("model", "endpoint") if self.params.get(name)}

    def _found_by_hours(self, records: QuerySet[UsageRecord], hours: list[Hour]) -> list[UsageRecord]:
        """Return up to one record more than a page, from as few stretches of time as hold them."""
        stretches = self._stretches(hours)
        expected = float(_FIRST_PAGES * self.list_per_page)
        found: list[UsageRecord] = []
        for _ in range(_TRIES):
            taken, is_end = _take(stretches, expected)
            if taken:
                missing = self.list_per_page + 1 - len(found)
                found += records.filter(_within(taken))[:missing]
            if len(found) > self.list_per_page or (is_end and len(hours) < _MOST_HOURS):
                return found
            if taken:
                self.looked_back_to = taken[-1].first
            expected *= _WIDER
        self.older_url = self.get_query_string({BEFORE: str(Cursor(self.looked_back_to or timezone.now()))})
        return found

    def _stretches(self, hours: list[Hour]) -> Iterator[Stretch]:
        """Yield when there is something, newest first, a busy hour in several parts."""
        for start, requests, of_these in hours:
            width = max(_HOUR * min(1.0, _RECORDS_PER_STRETCH / requests), dt.timedelta(milliseconds=1))
            end = start + _HOUR
            if self.before is not None:
                end = min(end - _MICROSECOND, self.before.at) + _MICROSECOND
            while end > start:
                first = max(start, end - width)
                yield Stretch(first, end, of_these * ((end - first) / _HOUR))
                end = first

    def _hours(self, wanted: dict[str, str], of_keys: Q) -> list[Hour]:
        """Return the newest hours that have some of what is wanted, and of keys that have used something that day."""
        first, end = self.model_admin.bounds_of(self.params)
        first = max(first, timezone.now() - dt.timedelta(days=settings.USAGE_RETENTION_DAYS + 1))
        end = min(end, self.before.at) if self.before is not None else end
        hours = UsageHour.objects.filter(
            Q(day__gt=first.date()) | Q(day=first.date(), hour__gte=first.hour),
            Q(day__lt=end.date()) | Q(day=end.date(), hour__lte=end.hour),
        )
        shares = _shares(of_keys, first.date(), end.date()) if of_keys else {}
        if of_keys:
            hours = hours.filter(day__in=shares)
        sums = hours.order_by("-day", "-hour").values_list("day", "hour")
        rows = sums.annotate(total=Sum("requests"), wanted=Sum("requests", filter=Q(**wanted) if wanted else None))
        return [
            (dt.datetime.combine(day, dt.time(hour), dt.UTC), int(total), int(of_these) * shares.get(day, 1.0))
            for day, hour, total, of_these in rows.filter(wanted__gt=0)[:_MOST_HOURS]
        ]


def _shares(of_keys: Q, first: dt.date, last: dt.date) -> dict[dt.date, float]:
    """Return what part of a day's requests is of some keys, for the days on which they have any."""
    days = KeyDay.objects.filter(day__gte=first, day__lte=last).order_by().values_list("day")
    sums = days.annotate(total=Sum("requests"), theirs=Sum("requests", filter=of_keys))
    return {day: int(theirs) / int(total) for day, total, theirs in sums if theirs}


def _take(stretches: Iterator[Stretch], expected: float) -> tuple[list[Stretch], bool]:
    """Return the next stretches that may hold so many, and whether those were the last."""
    taken: list[Stretch] = []
    while expected > 0:
        stretch = next(stretches, None)
        if stretch is None:
            return taken, True
        taken.append(stretch)
        expected -= stretch.expected
    return taken, False


def _within(stretches: list[Stretch]) -> Q:
    """Return the condition on records for stretches, newest first; those that touch become one."""
    spans: list[list[dt.datetime]] = []
    for stretch in stretches:
        if spans and spans[-1][0] == stretch.end:
            spans[-1][0] = stretch.first
        else:
            spans.append([stretch.first, stretch.end])
    between = [Q(started_at__gte=first, started_at__lt=end) for first, end in spans]
    whole = Q(started_at__gte=spans[-1][0], started_at__lt=spans[0][1])
    return whole & functools.reduce(operator.or_, between)
