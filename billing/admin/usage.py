"""Records and their sums, to look at; without a COUNT, whose time grows with the table."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.contrib import admin
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _
from unfold.paginator import InfinitePaginator

from billing.admin.base import PAGE, ReadOnlyAdmin, in_red_if
from billing.events import OUTCOMES
from billing.fields import plain_usd
from billing.models import ApiKey, Pricing, UsageDay, UsageRecord


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
        value = self.value()
        if not value or not value.isdecimal() or len(value) > 4:
            return queryset
        first = timezone.now().date() - dt.timedelta(days=int(value))
        return queryset.filter(**{f"{self.column}__gte": self.bound(first)})

    def bound(self, first: dt.date) -> Any:
        return first


class RecordPeriodFilter(PeriodFilter):
    column = "started_at"

    def bound(self, first: dt.date) -> Any:
        return dt.datetime.combine(first, dt.time(), dt.UTC)


class TroubleFilter(admin.SimpleListFilter):
    """Records that somebody may have to look into: each choice has a small index of its own."""

    title = _("trouble")
    parameter_name = "trouble"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        endings = [(outcome, outcome) for outcome in OUTCOMES if outcome != "completed"]
        return [(Pricing.UNPRICED, Pricing.UNPRICED.label), *endings]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value()
        if value == Pricing.UNPRICED:
            return queryset.filter(pricing=value)
        return queryset.filter(outcome=value) if value in OUTCOMES and value != "completed" else queryset


@admin.register(UsageRecord)
class UsageRecordAdmin(ReadOnlyAdmin):
    list_display = (
        "started_at",
        "key",
        "endpoint",
        "model",
        "status",
        "outcome",
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "cost",
        "usage_source",
        "first_byte_ms",
        "own_ms",
    )
    list_select_related = ("key",)
    list_filter = (RecordPeriodFilter, TroubleFilter)
    list_per_page = PAGE
    paginator = UncountedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    search_fields = ("pk",)
    search_help_text = _("A key's label, hint or fingerprint, or the id of an event.")
    sortable_by = ()

    def get_ordering(self, request: HttpRequest) -> tuple[str, ...]:
        """Return the order that an index has: ids sort by time too, but the smaller indexes hold the time itself."""
        return ("-started_at",) if request.GET.get(TroubleFilter.parameter_name) else ("-pk",)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[UsageRecord], search_term: str
    ) -> tuple[QuerySet[UsageRecord], bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        keys = ApiKey.objects.filter(Q(label__icontains=term) | Q(hint__icontains=term) | Q(fingerprint=term))
        # The keys first: one statement over both would read every record.
        found = list(keys.values_list("pk", flat=True)[:PAGE])
        if not found:
            return queryset.filter(pk=term), False
        return queryset.filter(key__in=found).order_by("-started_at", "-pk"), False

    @admin.display(description=_("cost (USD)"))
    def cost(self, record: UsageRecord) -> Any:
        if record.pricing == Pricing.UNPRICED:
            return format_html('<strong style="color: #dc2626">{}</strong>', _("unpriced"))
        return plain_usd(record.cost_usd)

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
        "input_tokens",
        "cached_input_tokens",
        "output_tokens",
        "cost",
        "average_first_byte_ms",
        "average_own_ms",
    )
    list_select_related = ("key",)
    list_filter = (PeriodFilter,)
    list_per_page = PAGE
    paginator = UncountedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    ordering = ("-day", "-pk")
    sortable_by = ()

    @admin.display(description=_("cost (USD)"))
    def cost(self, day: UsageDay) -> str:
        return plain_usd(day.cost_usd)

    @admin.display(description=_("unpriced requests"))
    def unpriced(self, day: UsageDay) -> Any:
        return in_red_if(day.unpriced_requests)

    @admin.display(description=_("average ms to the first byte"))
    def average_first_byte_ms(self, day: UsageDay) -> str:
        return f"{day.first_byte_ms_sum / max(day.requests, 1):.0f}"

    @admin.display(description=_("average own ms"))
    def average_own_ms(self, day: UsageDay) -> str:
        return f"{day.proxy_us_sum / 1000 / max(day.requests, 1):.1f}"
