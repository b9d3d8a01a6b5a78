"""What the ledger's pages have in common."""

from __future__ import annotations

from typing import Any

from django.db.models import Model
from django.http import HttpRequest
from django.utils.html import format_html
from unfold.admin import ModelAdmin

PAGE = 20


class ReadOnlyAdmin(ModelAdmin):
    """What is recorded is looked at, nothing else."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


def in_red_if(count: int) -> Any:
    return format_html('<strong style="color: #dc2626">{}</strong>', count) if count else 0
