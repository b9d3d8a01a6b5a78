"""The admin's side bar: what operators look at most comes first, and only what each of them may see."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse, reverse_lazy
from django.utils.translation import gettext_lazy as _

# Group, then the models in it with their icons and, if the model's own name says little, another; whatever else is
# registered comes last.
_GROUPS: tuple[tuple[Any, tuple[tuple[Any, ...], ...]], ...] = (
    (
        _("Ledger"),
        (
            ("billing.ApiKey", "key"),
            ("billing.Grant", "payments"),
            ("billing.UsageRecord", "receipt_long"),
            ("billing.UsageDay", "calendar_month"),
            ("billing.ModelPrice", "sell"),
        ),
    ),
    (_("Conversations"), (("sessions_api.ChatSession", "forum"),)),
    (
        _("People"),
        (
            ("auth.User", "person"),
            ("auth.Group", "group", _("Roles")),
            ("axes.AccessLog", "login", _("Logins")),
            ("axes.AccessFailureLog", "gpp_bad", _("Failed logins")),
            ("axes.AccessAttempt", "lock_clock", _("Locked logins")),
            ("admin.LogEntry", "history", _("Audit log")),
        ),
    ),
    (
        _("Upkeep"),
        (
            ("django_celery_beat.PeriodicTask", "schedule"),
            ("proxysite.TaskRun", "task_alt"),
            ("billing.Purge", "auto_delete"),
        ),
    ),
)


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """Return unfold's groups of links."""
    links = _links(request)
    groups: list[dict[str, Any]] = [
        {"items": [{"title": _("Overview"), "icon": "monitoring", "link": reverse_lazy("admin:index")}]}
    ]
    for title, entries in _GROUPS:
        items = [
            {**links.pop(label), "icon": icon} | ({"title": other[0]} if other else {})
            for label, icon, *other in entries
            if label in links
        ]
        if items:
            groups.append({"title": title, "separator": True, "items": items})
    if links:
        groups.append({"title": _("More"), "separator": True, "collapsible": True, "items": list(links.values())})
    return groups


def account_links(request: HttpRequest) -> list[dict[str, Any]]:
    """Return what the menu below an operator's name offers besides."""
    return [{"title": _("Second factor"), "link": reverse("admin:second_factor")}]


def _links(request: HttpRequest) -> dict[str, dict[str, Any]]:
    """Return a link for each model that this operator may see, by its label."""
    return {
        model["model"]._meta.label: {"title": model["name"], "link": model["admin_url"], "icon": "table_rows"}
        for app in admin.site.get_app_list(request)
        for model in app["models"]
        if model["admin_url"]
    }
