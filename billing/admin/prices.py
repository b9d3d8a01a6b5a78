"""Prices, and the runs of retention."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from billing.admin.base import ListAdmin, ReadOnlyAdmin
from billing.list_prices import list_price
from billing.models import ModelPrice, PriceSource, Purge
from billing.pricing import TOKEN_PRICES, UNIT_PRICES


@admin.register(ModelPrice)
class ModelPriceAdmin(ListAdmin):
    list_display = (
        "model",
        "valid_from",
        "input_beside_list",
        "cached_input_beside_list",
        "output_beside_list",
        "source",
        "note",
        "created_by",
    )
    list_select_related = ("created_by",)
    list_filter = ("source",)
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

    @admin.display(description=_("input (list)"), ordering="input")
    def input_beside_list(self, price: ModelPrice) -> Any:
        return _beside_list(price, "input")

    @admin.display(description=_("cached input (list)"), ordering="cached_input")
    def cached_input_beside_list(self, price: ModelPrice) -> Any:
        return _beside_list(price, "cached_input")

    @admin.display(description=_("output (list)"), ordering="output")
    def output_beside_list(self, price: ModelPrice) -> Any:
        return _beside_list(price, "output")


def _beside_list(price: ModelPrice, name: str) -> Any:
    """Return a price, and beside it the list's price at the moment from which it is valid."""
    listed = list_price(price.model, price.valid_from)
    ours, theirs = getattr(price, name), None if listed is None else getattr(listed.price, name)
    return format_html('{} <span class="text-subtle">({})</span>', _written(ours), _written(theirs))


def _written(usd: Decimal | None) -> str:
    return "–" if usd is None else f"{usd.normalize():f}"


@admin.register(Purge)
class PurgeAdmin(ReadOnlyAdmin):
    list_display = ("before", "started_at", "finished_at", "deleted")
    ordering = ("-pk",)
