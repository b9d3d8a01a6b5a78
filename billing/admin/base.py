"""What the admin's lists have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django.utils.html import format_html
from unfold.views import ChangeList

from billing.admin.audit import AuditedAdmin
from billing.admin.export import is_export

PAGE = 20


class PreparedList(ChangeList):
    """A page whose rows' further figures are read for all of them at once; none is read where all are exported."""

    model_admin: Any

    def get_results(self, request: HttpRequest) -> None:
        if not is_export(request):
            self.read_page(request)

    def read_page(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.model_admin.prepare_rows(list(self.result_list))


class ListAdmin(AuditedAdmin):
    """A list that can be exported, whose changes are written down before and after."""

    list_per_page = PAGE
    list_fullwidth = True
    list_filter_submit = True
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> Any:
        return PreparedList


class ReadOnlyAdmin(ListAdmin):
    """What is recorded is looked at, nothing else."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


def alarming(text: Any) -> Any:
    return format_html('<strong class="text-red-600 dark:text-red-400">{}</strong>', text)


def in_red_if(count: int) -> Any:
    return alarming(count) if count else 0


def sparkline(values: Sequence[float], *, label: str) -> Any:
    """Return a line of that many points as SVG, as high as its highest one."""
    width, height = 90, 20
    most = max(values, default=0)
    if not most:
        return format_html('<span class="text-subtle">{}</span>', "–")
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{place * step:.1f},{height - 1 - value / most * (height - 2):.1f}" for place, value in enumerate(values)
    )
    return format_html(
        '<svg class="text-primary-600 dark:text-primary-500" width="{0}" height="{1}" viewBox="0 0 {0} {1}" role="img">'
        '<title>{2}</title><polyline points="{3}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>',
        width,
        height,
        label,
        points,
    )
