"""Records and their sums, to look at; without a COUNT, whose time grows with the table."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR
from django.db import connection
from django.db.models import BigIntegerField, BooleanField, F, Func, Q, QuerySet
from django.db.models.expressions import RawSQL
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext_lazy as _
from unfold.contrib.filters.admin import TextFilter
from unfold.paginator import InfinitePaginator

from billing.admin import pieces
from billing.admin.base import PAGE, ReadOnlyAdmin, alarming, in_red_if
from billing.admin.record_list import RecordList
from billing.events import OUTCOMES
from billing.fields import plain_usd
from billing.models import ApiKey, PriceSource, Pricing, Quantities, UsageDay, UsageRecord

_DAY = dt.timedelta(days=1)
_RECORDS_PER_PIECE = 2000
# Word for word the conditions of two indexes: by a parameter SQLite would not know them again.
_TABLE = UsageRecord._meta.db_table
_IS_UNPRICED = RawSQL(f"{_TABLE}.pricing = 'unpriced'", (), output_field=BooleanField())  # noqa: S611 - no data
_IS_TROUBLE = RawSQL(f"NOT ({_TABLE}.outcome = 'completed')", (), output_field=BooleanField())  # noqa: S611 - no data
# By this no index is looked at.
_UNINDEXED_KEY = Func(F("key"), template="(+%(expressions)s)", output_field=BigIntegerField())


class UncountedPaginator(InfinitePaginator):
    """Pages without COUNT(*), which reads the whole table; bounded, since a far page reads all those before it."""

    count = 1000 * PAGE


class PeriodFilter(admin.SimpleListFilter):
    """The days up to now: the newest records are those that an index finds first."""

    title = _("period")
    parameter_name = "period"
    column = "day"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [("0", _("today")), ("6", _("7 days")), ("29", _("30 days")), ("89", _("90 days"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        days = self.days_in(self.value())
        if days is None:
            return queryset
        return queryset.filter(**{f"{self.column}__gte": self.bound(timezone.now().date() - days)})

    @staticmethod
    def days_in(value: str | None) -> dt.timedelta | None:
        """Return the days before today that a value names, None if it names none."""
        return dt.timedelta(days=int(value)) if value and value.isdecimal() and len(value) <= 4 else None

    def bound(self, first: dt.date) -> Any:
        return first


class RecordPeriodFilter(PeriodFilter):
    column = "started_at"

    def bound(self, first: dt.date) -> Any:
        return _midnight(first)


class DayFilter(TextFilter):
    """One day, written as 2026-11-20."""

    title = _("day (UTC)")
    parameter_name = "day"

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        day = _day(self.value())
        return queryset if day is None else self.on(queryset, day)

    def on(self, queryset: QuerySet[Any], day: dt.date) -> QuerySet[Any]:
        return queryset.filter(day=day)


class RecordDayFilter(DayFilter):
    def on(self, queryset: QuerySet[Any], day: dt.date) -> QuerySet[Any]:
        start = _midnight(day)
        return queryset.filter(started_at__gte=start, started_at__lt=start + _DAY)


class KeyFilter(TextFilter):
    """A key by its label, hint or fingerprint; all whose label or hint holds the text."""

    title = _("key")
    parameter_name = "key"

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = (self.value() or "").strip()
        return of_keys(queryset, keys_like(value)) if value else queryset


class ExactFilter(TextFilter):
    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{str(self.parameter_name): self.value()}) if self.value() else queryset


class ModelFilter(ExactFilter):
    title = _("model")
    parameter_name = "model"


class EndpointFilter(ExactFilter):
    title = _("endpoint")
    parameter_name = "endpoint"


class TroubleFilter(admin.SimpleListFilter):
    """How requests ended; all but the good end have a small index of their own, as have those without a price."""

    title = _("outcome")
    parameter_name = "trouble"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [(Pricing.UNPRICED, Pricing.UNPRICED.label), *((outcome, outcome_name(outcome)) for outcome in OUTCOMES)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value()
        if value == Pricing.UNPRICED:
            return queryset.filter(_IS_UNPRICED)
        if value == "completed":
            return queryset.filter(outcome=value)
        return queryset.filter(_IS_TROUBLE, outcome=value) if value in OUTCOMES else queryset


def outcome_name(outcome: str) -> Any:
    """Return an outcome as operators read it."""
    return {
        "completed": _("completed"),
        "client_closed": _("client left"),
        "upstream_error": _("upstream failed"),
        "timeout": _("timed out"),
        "refused": _("refused"),
    }.get(outcome, outcome)


def tokens_in(row: Quantities) -> str:
    """Return the tokens of a record or a day: input, cached input and output, each of all kinds."""
    plain = row.input_tokens + row.cache_write_tokens + row.audio_input_tokens + row.image_input_tokens
    cached = row.cached_input_tokens + row.cached_audio_input_tokens + row.cached_image_input_tokens
    output = row.output_tokens + row.audio_output_tokens + row.image_output_tokens
    return f"{plain:,} + {cached:,} → {output:,}"


Keys = list[int] | QuerySet[ApiKey, int]


def keys_like(text: str) -> Keys:
    """Return the ids of all keys by label, hint or fingerprint: of one or none itself, of more a query for them."""
    found = Q(label__icontains=text) | Q(hint__icontains=text) | Q(fingerprint=text)
    ids = ApiKey.objects.filter(found).order_by().values_list("pk", flat=True)
    first = list(ids[:2])
    return ids if len(first) > 1 else first


def of_keys(rows: QuerySet[Any], keys: Keys) -> QuerySet[Any]:
    """Return the rows of these keys; those of many are found in the order of time, or all would be sorted by it."""
    if isinstance(keys, list):
        return rows.filter(key__in=keys)
    found: QuerySet[Any] = rows.alias(unindexed_key=_UNINDEXED_KEY).filter(unindexed_key__in=keys)
    return found


def _day(text: str | None) -> dt.date | None:
    """Return a date that is written down, None for what is none or has no next day."""
    try:
        day = dt.date.fromisoformat((text or "").strip())
    except ValueError:
        return None
    return day if day < dt.date.max else None


def _midnight(day: dt.date) -> dt.datetime:
    return dt.datetime.combine(day, dt.time(), dt.UTC)


@admin.register(UsageRecord)
class UsageRecordAdmin(ReadOnlyAdmin):
    list_display = (
        "started_at",
        "key",
        "endpoint",
        "model",
        "ending",
        "tokens",
        "cost",
        "first_byte_ms",
        "own_ms",
    )
    list_select_related = ("key",)
    list_filter = (RecordDayFilter, RecordPeriodFilter, KeyFilter, ModelFilter, EndpointFilter, TroubleFilter)
    fields = (
        "event_id",
        "started_at",
        "key",
        "method",
        "endpoint",
        "model",
        "service_tier",
        "is_stream",
        "is_batch",
        "ending",
        "upstream_request_id",
        "input_tokens",
        "cached_input_tokens",
        "cache_write_tokens",
        "output_tokens",
        "reasoning_tokens",
        "audio_input_tokens",
        "cached_audio_input_tokens",
        "audio_output_tokens",
        "image_input_tokens",
        "cached_image_input_tokens",
        "image_output_tokens",
        "images",
        "characters",
        "audio_ms",
        "tokens_from",
        "cost",
        "price_from",
        "price_version",
        "price_factor",
        "first_byte_ms",
        "duration_ms",
        "own_ms",
        "request_bytes",
        "response_bytes",
    )
    search_fields = ("pk",)
    search_help_text = _("A key's label, hint or fingerprint, or the id of an event.")
    ordering = ("-started_at", "-pk")
    sortable_by = ()

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> Any:
        return RecordList

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[UsageRecord], search_term: str
    ) -> tuple[QuerySet[UsageRecord], bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        found = keys_like(term)
        return (queryset.filter(pk=term) if found == [] else of_keys(queryset, found)), False

    def keys_in(self, params: Mapping[str, Any]) -> list[Keys]:
        """Return the keys that each filter of a list names."""
        texts = (params.get(name, "").strip() for name in (KeyFilter.parameter_name, SEARCH_VAR))
        return [keys_like(text) for text in texts if text]

    def has_own_index(self, params: Mapping[str, Any], keys: list[Keys]) -> bool:
        """Return whether an index of the records has what these filters let through, in the list's order."""
        trouble = params.get(TroubleFilter.parameter_name)
        return (trouble or "completed") != "completed" or any(isinstance(found, list) for found in keys)

    def bounds_of(self, params: Mapping[str, Any]) -> tuple[dt.datetime, dt.datetime]:
        """Return from when until when the filters of a list let records through."""
        day = _day(params.get(DayFilter.parameter_name))
        if day is not None:
            return _midnight(day), _midnight(day) + _DAY - dt.timedelta(microseconds=1)
        period = PeriodFilter.days_in(params.get(PeriodFilter.parameter_name))
        first = _midnight(dt.date(2000, 1, 1)) if period is None else _midnight(timezone.now().date() - period)
        return first, timezone.now() + _DAY

    def get_export_pieces(self, request: HttpRequest) -> Iterator[list[Any]]:
        """Yield them by their ids, which are made in the order of time: PostgreSQL has no order by time itself.

        SQLite has, and would sort all that a filter lets through by their ids, once for each piece.
        """
        column = "started_at" if connection.vendor == "sqlite" else "pk"
        return pieces.newest_first(self.get_export_rows(request), column, _RECORDS_PER_PIECE)

    @admin.display(description=_("outcome"))
    def ending(self, record: UsageRecord) -> Any:
        if record.outcome == "completed":
            return record.status if record.status < 400 else alarming(record.status)
        return alarming(f"{outcome_name(record.outcome)} ({record.status or '–'})")

    @admin.display(description=_("tokens (input + cached → output)"))
    def tokens(self, record: UsageRecord) -> str:
        """Return them all, with ≈ where they are an estimate."""
        return ("≈ " if record.usage_source == "estimated" else "") + tokens_in(record)

    @admin.display(description=_("usage from"))
    def tokens_from(self, record: UsageRecord) -> Any:
        return {"upstream": _("upstream"), "estimated": _("estimated")}.get(record.usage_source, _("none"))

    @admin.display(description=_("price from"))
    def price_from(self, record: UsageRecord) -> Any:
        return dict(PriceSource.choices).get(record.price_source, "–")

    @admin.display(description=_("cost (USD)"))
    def cost(self, record: UsageRecord) -> Any:
        return alarming(_("unpriced")) if record.cost_usd is None else plain_usd(record.cost_usd)

    @admin.display(description=_("own ms"))
    def own_ms(self, record: UsageRecord) -> str:
        return f"{record.proxy_us / 1000:.1f}"


@admin.register(UsageDay)
class UsageDayAdmin(ReadOnlyAdmin):
    list_display = (
        "day",
        "key",
        "model",
        "endpoint",
        "requests",
        "errors",
        "unpriced",
        "tokens",
        "cost",
        "average_first_byte_ms",
        "average_own_ms",
    )
    list_select_related = ("key",)
    list_filter = (DayFilter, PeriodFilter, KeyFilter, ModelFilter, EndpointFilter)
    paginator = UncountedPaginator
    ordering = ("-day", "-pk")
    sortable_by = ()

    def get_export_pieces(self, request: HttpRequest) -> Iterator[list[Any]]:
        return pieces.newest_first(self.get_export_rows(request), "day", _RECORDS_PER_PIECE)

    @admin.display(description=_("tokens (input + cached → output)"))
    def tokens(self, day: UsageDay) -> str:
        return tokens_in(day)

    @admin.display(description=_("cost (USD)"))
    def cost(self, day: UsageDay) -> str:
        return plain_usd(day.cost_usd)

    @admin.display(description=_("unpriced requests"))
    def unpriced(self, day: UsageDay) -> Any:
        return in_red_if(day.unpriced_requests)

    @admin.display(description=_("average ms to a stream's first byte"))
    def average_first_byte_ms(self, day: UsageDay) -> str:
        return f"{day.first_byte_ms_sum / day.begun_streams:.0f}" if day.begun_streams else "–"

    @admin.display(description=_("average own ms"))
    def average_own_ms(self, day: UsageDay) -> str:
        return f"{day.proxy_us_sum / 1000 / max(day.requests, 1):.1f}"
