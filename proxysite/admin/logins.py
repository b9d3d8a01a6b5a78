"""Who logged in, who failed to, and whom failures have locked out."""

from __future__ import annotations

from typing import Any, ClassVar

from axes.models import AccessAttempt, AccessFailureLog, AccessLog
from django.conf import settings
from django.contrib import admin
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from billing.admin.base import ReadOnlyAdmin, alarming


class _LoginAdmin(ReadOnlyAdmin):
    list_filter: ClassVar[Any] = ("attempt_time",)
    search_fields = ("=ip_address", "username")
    list_display_links = None  # the list has all of it
    ordering = ("-pk",)
    export_fields: ClassVar[Any] = ("attempt_time", "username", "ip_address", "user_agent", "path_info")


@admin.register(AccessLog)
class AccessLogAdmin(_LoginAdmin):
    list_display = ("attempt_time", "username", "ip_address", "user_agent", "logout_time")
    fields = ("attempt_time", "logout_time", "username", "ip_address", "user_agent")


@admin.register(AccessFailureLog)
class AccessFailureLogAdmin(_LoginAdmin):
    list_display = ("attempt_time", "username", "ip_address", "user_agent", "locked_out")
    list_filter = ("attempt_time", "locked_out")
    fields = ("attempt_time", "username", "ip_address", "user_agent", "locked_out")


@admin.register(AccessAttempt)
class AccessAttemptAdmin(_LoginAdmin):
    """What is counted now: to remove it is to unlock."""

    list_display = ("attempt_time", "username", "ip_address", "user_agent", "failures_since_start", "state")
    export_fields = (*_LoginAdmin.export_fields, "failures_since_start")
    fields = ("attempt_time", "username", "ip_address", "user_agent", "failures_since_start", "state")

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return bool(request.user.has_perm("axes.delete_accessattempt"))

    def get_queryset(self, request: HttpRequest) -> QuerySet[AccessAttempt]:
        """Return those that still count."""
        attempts: QuerySet[AccessAttempt] = super().get_queryset(request)
        return attempts.filter(attempt_time__gt=timezone.now() - settings.AXES_COOLOFF_TIME)

    @admin.display(description=_("state"))
    def state(self, attempt: Any) -> Any:
        is_locked = attempt.failures_since_start >= settings.AXES_FAILURE_LIMIT
        return alarming(_("locked out")) if is_locked else _("counted")
