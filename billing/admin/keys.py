"""Keys: what each has left, how it is used, and whether it may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.db import transaction
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest
from django.utils import timezone
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext, ngettext_lazy
from unfold.admin import TabularInline

from billing import selectors, services
from billing.admin import audit, confirm
from billing.admin.base import alarming, in_red_if, sparkline
from billing.admin.buttons import button
from billing.admin.pasting import PastedKeyAdmin
from billing.fields import plain_usd
from billing.forms import KEY_LIMITS, CountedTogether, ManyGrantsForm, NewKeyForm
from billing.models import ApiKey, Grant
from billing.selectors import Balance

if TYPE_CHECKING:
    from django.utils.functional import _StrPromise as StrPromise


@dataclass(frozen=True, slots=True)
class _Switch:
    """Something that is on or off for a key: how an operator is asked, what is done, and how it is told of."""

    action: str
    title: StrPromise
    explanation: StrPromise
    change: Callable[[Iterable[ApiKey]], list[ApiKey]]
    field: str
    is_on: bool
    done: StrPromise


_BLOCK = _Switch(
    "block",
    _("Block keys"),
    _("Every gateway will refuse these keys, within 10 seconds; streams that run go on:"),
    services.block_keys,
    "blocked",
    True,
    ngettext_lazy("%(count)d key blocked.", "%(count)d keys blocked.", "count"),
)
_UNBLOCK = _Switch(
    "unblock",
    _("Unblock keys"),
    _("Every gateway will take these keys again:"),
    services.unblock_keys,
    "blocked",
    False,
    ngettext_lazy("%(count)d key unblocked.", "%(count)d keys unblocked.", "count"),
)
_REGISTER = _Switch(
    "register",
    _("Register keys"),
    _("With GATEWAY_MODE=known these keys will pass:"),
    services.register_keys,
    "registered",
    True,
    ngettext_lazy("%(count)d key registered.", "%(count)d keys registered.", "count"),
)
_UNREGISTER = _Switch(
    "unregister",
    _("Unregister keys"),
    _("With GATEWAY_MODE=known every gateway will refuse these keys:"),
    services.unregister_keys,
    "registered",
    False,
    ngettext_lazy("%(count)d key unregistered.", "%(count)d keys unregistered.", "count"),
)


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


@admin.register(ApiKey)
class ApiKeyAdmin(PastedKeyAdmin):
    list_display = (
        "__str__",
        "owner",
        "state",
        "granted",
        "used",
        "balance",
        "trend",
        "unpriced",
        "last_used_at",
    )
    export_fields = (
        "fingerprint",
        "hint",
        "label",
        "owner",
        "blocked",
        "registered",
        "price_factor",
        *KEY_LIMITS,
        "granted_usd",
        "used_usd",
        "balance_usd",
        "unpriced_requests",
        "first_used_at",
        "last_used_at",
    )
    list_filter = ("blocked", "registered")
    search_fields = ("label", "owner", "hint", "=fingerprint")
    ordering = ("-last_used_at",)
    actions = ("block", "unblock", "register", "unregister", "grant")
    actions_detail: Any = ("block_this", "unblock_this")
    inlines = (GrantInline,)
    form = CountedTogether
    new_form = NewKeyForm
    fields = (
        "label",
        "owner",
        "price_factor",
        *KEY_LIMITS,
        "registered",
        "hint",
        "fingerprint",
        "state",
        "granted",
        "used",
        "balance",
        "trend",
        "unpriced",
        "first_used_at",
        "last_used_at",
        "created_at",
    )
    fields_at_first = fields[: fields.index("registered")]
    readonly_fields = fields[fields.index("hint") :]

    def prepare_rows(self, rows: list[ApiKey]) -> None:
        """Read the balances and the last days of all these keys, in three queries."""
        now, key_ids = timezone.now(), [key.pk for key in rows]
        balances = selectors.balances_of(key_ids, now)
        costs = selectors.window_costs(key_ids, now)
        for key in rows:
            key.known_balance, key.known_costs = balances[key.pk], costs[key.pk]  # type: ignore[attr-defined]

    def get_inlines(self, request: HttpRequest, obj: ApiKey | None) -> Any:
        return () if obj is None else self.inlines

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        services.save_policy(obj)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        for grant in formset.save(commit=False):
            grant.given_by = request.user
            grant.save(force_insert=True)
        formset.save_m2m()

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> Any:
        """Return only the button that would change anything."""
        key: ApiKey | None = self.get_object(request, object_id)
        is_blocked = key is not None and key.blocked
        unwanted = "block_this" if is_blocked else "unblock_this"
        return [
            shown
            for shown in super().get_actions_detail(request, object_id)
            if not shown.action_name.endswith(f"_apikey_{unwanted}")
        ]

    # Figures

    def _balance(self, key: Any) -> Balance:
        if not hasattr(key, "known_balance"):
            self.prepare_rows([key])
        known: Balance = key.known_balance
        return known

    @admin.display(description=_("state"))
    def state(self, key: ApiKey) -> Any:
        return alarming(_("blocked")) if key.blocked else _("active")

    def granted_usd(self, key: ApiKey) -> Decimal:
        return self._balance(key).in_cents().total

    def used_usd(self, key: ApiKey) -> Decimal:
        return self._balance(key).in_cents().used

    def balance_usd(self, key: ApiKey) -> Decimal:
        return self._balance(key).in_cents().balance

    @admin.display(description=_("granted (USD)"))
    def granted(self, key: ApiKey) -> str:
        return plain_usd(self.granted_usd(key))

    @admin.display(description=_("used (USD)"))
    def used(self, key: ApiKey) -> str:
        return plain_usd(self.used_usd(key))

    @admin.display(description=_("balance (USD)"))
    def balance(self, key: ApiKey) -> Any:
        amount_usd = self.balance_usd(key)
        return alarming(plain_usd(amount_usd)) if amount_usd < 0 else plain_usd(amount_usd)

    @admin.display(description=_("use"))
    def trend(self, key: Any) -> Any:
        self._balance(key)
        costs = [float(cost) for cost in key.known_costs]
        label = _("USD a day over %(days)d days, at most %(most).2f") % {"days": len(costs), "most": max(costs)}
        return sparkline(costs, label=label)

    @admin.display(description=_("unpriced requests"))
    def unpriced(self, key: ApiKey) -> Any:
        return in_red_if(self.unpriced_requests(key))

    def unpriced_requests(self, key: ApiKey) -> int:
        return self._balance(key).unpriced_requests

    # Actions

    @admin.action(description=_("Block: gateways refuse these keys"), permissions=["change"])
    def block(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> Any:
        return self._turn(request, keys, _BLOCK)

    @admin.action(description=_("Unblock"), permissions=["change"])
    def unblock(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> Any:
        return self._turn(request, keys, _UNBLOCK)

    @admin.action(description=_("Register: these keys pass with GATEWAY_MODE=known"), permissions=["change"])
    def register(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> Any:
        return self._turn(request, keys, _REGISTER)

    @admin.action(description=_("Unregister"), permissions=["change"])
    def unregister(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> Any:
        return self._turn(request, keys, _UNREGISTER)

    @button(description=_("Block"), icon="block", permissions=["change"])
    def block_this(self, request: HttpRequest, object_id: str) -> Any:
        return self._ask(request, self._only(request, object_id), _BLOCK)

    @button(description=_("Unblock"), icon="check_circle", permissions=["change"])
    def unblock_this(self, request: HttpRequest, object_id: str) -> Any:
        return self._ask(request, self._only(request, object_id), _UNBLOCK)

    @admin.action(description=_("Give each of these keys a grant"), permissions=["grant"])
    def grant(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> Any:
        is_confirmed = confirm.is_confirmed(request)
        form = ManyGrantsForm(request.POST if is_confirmed else None)
        if not (is_confirmed and form.is_valid()):
            return confirm.question(
                self,
                request,
                keys,
                action="grant",
                title=_("Give a grant to each key"),
                explanation=_("Each of these keys gets the whole amount:"),
                form=form,
            )
        operator: Any = request.user
        try:
            with transaction.atomic():
                grants = services.give_grants(keys, given_by=operator, **form.cleaned_data)
                audit.log_many_additions(request, grants)
        except services.AlreadyDoneError:  # by a second click, say
            self.message_user(request, _("These grants have been given already."), messages.WARNING)
            return None
        text = ngettext("%d grant given.", "%d grants given.", len(grants))
        self.message_user(request, text % len(grants), messages.SUCCESS)
        return None

    def has_grant_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("billing.add_grant"))

    def _only(self, request: HttpRequest, object_id: str) -> QuerySet[ApiKey]:
        key: ApiKey | None = self.get_object(request, object_id)
        if key is None:
            raise Http404
        return ApiKey.objects.filter(pk=key.pk)

    def _ask(self, request: HttpRequest, keys: QuerySet[ApiKey], switch: _Switch) -> Any:
        return confirm.question(
            self, request, keys, action=switch.action, title=switch.title, explanation=switch.explanation
        )

    def _turn(self, request: HttpRequest, keys: QuerySet[ApiKey], switch: _Switch) -> Any:
        if not confirm.is_confirmed(request):
            return self._ask(request, keys, switch)
        changed = switch.change(keys)
        for key in changed:
            self.log_change(request, key, audit.changed(key, **{switch.field: (not switch.is_on, switch.is_on)}))
        self.message_user(request, switch.done % {"count": len(changed)}, messages.SUCCESS)
        return None
