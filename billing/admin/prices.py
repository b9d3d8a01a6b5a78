"""Prices, and the runs of retention."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _
from unfold.admin import ModelAdmin

from billing.admin.base import PAGE, ReadOnlyAdmin
from billing.models import ModelPrice, PriceSource, Purge
from billing.pricing import TOKEN_PRICES, UNIT_PRICES


@admin.register(ModelPrice)
class ModelPriceAdmin(ModelAdmin):
    list_display = ("model", "valid_from", "input", "cached_input", "output", "source", "note", "created_by")
    list_select_related = ("created_by",)
    list_filter = ("source",)
    list_per_page = PAGE
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    search_fields = ("model", "note")
    ordering = ("model", "-valid_from")
    readonly_fields = ("source", "created_by", "created_at")
    fieldsets = (
        (None, {"fields": ("model", "valid_from", "note")}),
        (_("USD per million tokens"), {"fields": TOKEN_PRICES}),
        (_("USD per unit"), {"fields": UNIT_PRICES}),
        (_("Factors"), {"fields": ("batch_factor", "flex_factor", "priority_factor")}),
        (_("Where it comes from"), {"fields": readonly_fields}),
    )

    def has_change_permission(self, request: HttpRequest, obj: ModelPrice | None = None) -> bool:
        is_ours = obj is None or obj.source == PriceSource.OWN
        return is_ours and bool(super().has_change_permission(request, obj))

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            obj.created_by = request.user
        super().save_model(request, obj, form, change)


@admin.register(Purge)
class PurgeAdmin(ReadOnlyAdmin):
    list_display = ("before", "started_at", "finished_at", "deleted")
    ordering = ("-pk",)
