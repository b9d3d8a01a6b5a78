"""The log of changes: who, when, what, and each field before and after."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.models import ADDITION, CHANGE, DELETION, LogEntry
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.translation import gettext_lazy as _

from billing.admin import audit
from billing.admin.base import ReadOnlyAdmin


class ActionFilter(admin.SimpleListFilter):
    title = _("action")
    parameter_name = "action"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [(str(ADDITION), _("added")), (str(CHANGE), _("changed")), (str(DELETION), _("removed"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[LogEntry]) -> QuerySet[LogEntry]:
        value = self.value()
        return queryset.filter(action_flag=value) if value in ("1", "2", "3") else queryset


@admin.register(LogEntry)
class LogEntryAdmin(ReadOnlyAdmin):
    list_display = ("action_time", "user", "action", "kind", "what", "changes")
    list_select_related = ("user", "content_type")
    list_filter = (ActionFilter, "user")
    search_fields = ("object_repr", "user__username")
    ordering = ("-pk",)
    fields = ("action_time", "user", "action", "kind", "what", "changes")
    export_fields = ("action_time", "user", "action", "kind", "object_id", "object_repr", "changes_as_text")
    sortable_by = ()

    @admin.display(description=_("action"))
    def action(self, entry: LogEntry) -> Any:
        return {ADDITION: _("added"), CHANGE: _("changed"), DELETION: _("removed")}.get(entry.action_flag, "")

    @admin.display(description=_("kind"))
    def kind(self, entry: LogEntry) -> str:
        return entry.content_type.name if entry.content_type else "–"

    @admin.display(description=_("object"))
    def what(self, entry: LogEntry) -> Any:
        url = None if entry.is_deletion() else entry.get_admin_url()
        if not url:
            return entry.object_repr
        return format_html('<a class="text-primary-600 dark:text-primary-500" href="{}">{}</a>', url, entry.object_repr)

    @admin.display(description=_("before → after"))
    def changes(self, entry: LogEntry) -> Any:
        values = audit.values_in(entry)
        if not values:
            return audit.said_in(entry)
        line = '<span class="block whitespace-normal">{}: {} → <strong>{}</strong></span>'
        return format_html_join("", line, ((label, before or "–", after or "–") for label, before, after in values))

    def changes_as_text(self, entry: LogEntry) -> str:
        values = audit.values_in(entry)
        return "; ".join(f"{label}: {before} → {after}" for label, before, after in values) or audit.said_in(entry)
