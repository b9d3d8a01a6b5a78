"""A question before something is done to many rows at once."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db.models import Model, QuerySet
from django.forms import BaseForm
from django.http import HttpRequest
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.admin import ModelAdmin

_SHOWN = 20


def is_confirmed(request: HttpRequest) -> bool:
    return request.method == "POST" and "confirmed" in request.POST


def question(
    model_admin: ModelAdmin,
    request: HttpRequest,
    rows: QuerySet[Any],
    *,
    action: str,
    title: Any,
    explanation: Any,
    form: BaseForm | None = None,
) -> TemplateResponse:
    """Return a page that names the rows and asks; its answer comes back as the list's action, `confirmed`."""
    opts = model_admin.model._meta
    is_list = request.method == "POST"
    selected = request.POST.getlist(ACTION_CHECKBOX_NAME) if is_list else [str(row.pk) for row in rows]
    list_url = reverse(f"{model_admin.admin_site.name}:{opts.app_label}_{opts.model_name}_changelist")
    context = {
        **model_admin.admin_site.each_context(request),
        "opts": opts,
        "title": title,
        "explanation": explanation,
        "count": rows.count(),
        "shown": list(rows[:_SHOWN]),
        "selected": selected,
        "select_across": request.POST.get("select_across", "0"),
        "checkbox_name": ACTION_CHECKBOX_NAME,
        "action": action,
        "form": form,
        "target": request.get_full_path() if is_list else list_url,
        "back": request.get_full_path() if is_list else _page_of(model_admin, rows),
    }
    return TemplateResponse(request, "admin/confirm_action.html", context)


def _page_of(model_admin: ModelAdmin, rows: QuerySet[Any]) -> str:
    row: Model = rows[0]
    opts = row._meta
    return reverse(f"{model_admin.admin_site.name}:{opts.app_label}_{opts.model_name}_change", args=[row.pk])
