"""Keys and what they were granted."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext
from django.views.decorators.debug import sensitive_post_parameters
from unfold.admin import ModelAdmin, TabularInline

from billing import selectors, services
from billing.admin.base import PAGE, in_red_if
from billing.fields import plain_usd
from billing.forms import NewGrantForm, NewKeyForm
from billing.models import ApiKey, Grant
from billing.selectors import Balance


class GrantInline(TabularInline):
    model = Grant
    extra = 0
    fields = ("amount_usd", "reason", "valid_from", "valid_until", "revoked_at", "given_by")
    readonly_fields = ("revoked_at", "given_by")
    ordering = ("-pk",)
    verbose_name_plural = _("grants")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Grant]:
        grants: QuerySet[Grant] = super().get_queryset(request)
        return grants.select_related("given_by", "key")

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class KeyList(ChangeList):
    """A page of keys with their balances, read for all of them at once."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        balances = selectors.balances_of([key.pk for key in self.result_list], timezone.now())
        for key in self.result_list:
            key.known_balance = balances[key.pk]


def _balance_of(key: Any) -> Balance:
    if not hasattr(key, "known_balance"):
        key.known_balance = selectors.balances_of([key.pk], timezone.now())[key.pk]
    known: Balance = key.known_balance
    return known


@admin.register(ApiKey)
class ApiKeyAdmin(ModelAdmin):
    list_display = (
        "__str__",
        "owner",
        "state",
        "granted",
        "used",
        "balance",
        "unpriced",
        "first_used_at",
        "last_used_at",
    )
    list_filter = ("blocked",)
    list_per_page = PAGE
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    search_fields = ("label", "owner", "hint", "=fingerprint")
    ordering = ("-last_used_at",)
    actions = ("block", "unblock")
    inlines = (GrantInline,)
    fields = (
        "label",
        "owner",
        "price_factor",
        "hint",
        "fingerprint",
        "state",
        "granted",
        "used",
        "balance",
        "unpriced",
        "first_used_at",
        "last_used_at",
        "created_at",
    )
    readonly_fields = fields[3:]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> Any:
        return KeyList

    def get_form(self, request: HttpRequest, obj: ApiKey | None = None, change: bool = False, **kwargs: Any) -> Any:
        if obj is None:
            kwargs["form"] = NewKeyForm
        return super().get_form(request, obj, change=change, **kwargs)

    def get_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> Any:
        return ("api_key", *self.fields[:3]) if obj is None else self.fields

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> Any:
        return () if obj is None else self.readonly_fields

    def get_inlines(self, request: HttpRequest, obj: ApiKey | None) -> Any:
        return () if obj is None else self.inlines

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    @method_decorator(sensitive_post_parameters("api_key"))
    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().changeform_view(request, *args, **kwargs)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        for grant in formset.save(commit=False):
            grant.given_by = request.user
            grant.save(force_insert=True)
        formset.save_m2m()

    @admin.display(description=_("state"))
    def state(self, key: ApiKey) -> Any:
        return format_html('<strong style="color: #dc2626">{}</strong>', _("blocked")) if key.blocked else _("active")

    @admin.display(description=_("granted (USD)"))
    def granted(self, key: ApiKey) -> str:
        return plain_usd(_balance_of(key).in_cents().total)

    @admin.display(description=_("used (USD)"))
    def used(self, key: ApiKey) -> str:
        return plain_usd(_balance_of(key).in_cents().used)

    @admin.display(description=_("balance (USD)"))
    def balance(self, key: ApiKey) -> str:
        return plain_usd(_balance_of(key).in_cents().balance)

    @admin.display(description=_("unpriced requests"))
    def unpriced(self, key: ApiKey) -> Any:
        return in_red_if(_balance_of(key).unpriced_requests)

    @admin.action(description=_("Block: gateways refuse these keys"), permissions=["change"])
    def block(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> None:
        blocked = [key for key in keys if services.block_key(key)]
        self._report(request, blocked, "blocked", ngettext("%d key blocked.", "%d keys blocked.", len(blocked)))

    @admin.action(description=_("Unblock"), permissions=["change"])
    def unblock(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> None:
        unblocked = [key for key in keys if services.unblock_key(key)]
        self._report(
            request, unblocked, "unblocked", ngettext("%d key unblocked.", "%d keys unblocked.", len(unblocked))
        )

    def _report(self, request: HttpRequest, keys: list[ApiKey], done: str, text: str) -> None:
        for key in keys:
            self.log_change(request, key, done)
        self.message_user(request, text % len(keys), messages.SUCCESS)


@admin.register(Grant)
class GrantAdmin(ModelAdmin):
    list_display = ("key", "amount", "reason", "valid_from", "valid_until", "revoked_at", "given_by")
    list_select_related = ("key", "given_by")
    list_per_page = PAGE
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    search_fields = ("key__label", "key__owner", "key__hint", "reason")
    autocomplete_fields = ("key",)
    ordering = ("-pk",)
    actions = ("revoke",)
    fields = ("key", "amount_usd", "reason", "valid_from", "valid_until", "revoked_at", "given_by", "created_at")

    def get_form(self, request: HttpRequest, obj: Grant | None = None, change: bool = False, **kwargs: Any) -> Any:
        if obj is None:
            kwargs["form"] = NewGrantForm
        return super().get_form(request, obj, change=change, **kwargs)

    def get_fields(self, request: HttpRequest, obj: Grant | None = None) -> Any:
        return ("api_key", *self.fields[:5]) if obj is None else self.fields

    def get_readonly_fields(self, request: HttpRequest, obj: Grant | None = None) -> Any:
        return () if obj is None else [name for name in self.fields if name not in ("reason", "valid_until")]

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    @method_decorator(sensitive_post_parameters("api_key"))
    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return super().changeform_view(request, *args, **kwargs)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            if form.pasted:
                obj.key = services.ensure_key(**form.pasted)
            obj.given_by = request.user
        super().save_model(request, obj, form, change)

    @admin.display(description=_("amount (USD)"), ordering="amount_usd")
    def amount(self, grant: Grant) -> str:
        return plain_usd(grant.amount_usd)

    @admin.action(description=_("Revoke: these grants count no more"), permissions=["change"])
    def revoke(self, request: HttpRequest, grants: QuerySet[Grant]) -> None:
        revoked = [grant for grant in grants if services.revoke_grant(grant)]
        for grant in revoked:
            self.log_change(request, grant, "revoked")
        text = ngettext("%d grant revoked.", "%d grants revoked.", len(revoked))
        self.message_user(request, text % len(revoked), messages.SUCCESS)
