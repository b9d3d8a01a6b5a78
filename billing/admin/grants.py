"""Grants: given by pasting a key, never changed, revoked when they shall count no more."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from billing import selectors, services
from billing.admin import audit, confirm
from billing.admin.pasting import PastedKeyAdmin
from billing.fields import plain_usd
from billing.forms import NewGrantForm
from billing.models import Grant


class StateFilter(admin.SimpleListFilter):
    title = _("state")
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        return [("valid", _("valid")), ("revoked", _("revoked")), ("ended", _("ended"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Grant]) -> QuerySet[Grant]:
        now = timezone.now()
        if self.value() == "valid":
            return selectors.valid_grants(queryset, now)
        if self.value() == "revoked":
            return queryset.filter(revoked_at__isnull=False)
        return queryset.filter(Q(valid_until__lte=now)) if self.value() == "ended" else queryset


@admin.register(Grant)
class GrantAdmin(PastedKeyAdmin):
    list_display = ("key", "amount", "reason", "valid_from", "valid_until", "revoked_at", "given_by")
    list_select_related = ("key", "given_by")
    list_filter = (StateFilter,)
    search_fields = ("key__label", "key__owner", "key__hint", "reason")
    autocomplete_fields = ("key",)
    ordering = ("-pk",)
    actions = ("revoke",)
    new_form = NewGrantForm
    fields = ("key", "amount", "reason", "valid_from", "valid_until", "revoked_at", "given_by", "created_at")
    fields_at_first = ("key", "amount_usd", "reason", "valid_from", "valid_until", "token")
    readonly_fields = tuple(name for name in fields if name not in ("reason", "valid_until"))

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if change:
            # Nothing else: it may have been revoked since it was read.
            obj.save(update_fields=form.changed_data)
            return
        services.use_token(form.cleaned_data["token"])
        if form.pasted:
            obj.key = services.ensure_key(**form.pasted)
        obj.given_by = request.user
        super().save_model(request, obj, form, change)

    @admin.display(description=_("amount (USD)"), ordering="amount_usd")
    def amount(self, grant: Grant) -> str:
        return plain_usd(grant.amount_usd)

    @admin.action(description=_("Revoke: these grants count no more"), permissions=["change"])
    def revoke(self, request: HttpRequest, grants: QuerySet[Grant]) -> Any:
        if not confirm.is_confirmed(request):
            return confirm.question(
                self,
                request,
                grants,
                action="revoke",
                title=_("Revoke grants"),
                explanation=_("From now on these grants count no more; what was used of them stays used:"),
            )
        revoked = [grant for grant in grants if services.revoke_grant(grant)]
        for grant in revoked:
            grant.refresh_from_db(fields=["revoked_at"])
            self.log_change(request, grant, audit.changed(grant, revoked_at=(None, grant.revoked_at)))
        text = ngettext("%d grant revoked.", "%d grants revoked.", len(revoked))
        self.message_user(request, text % len(revoked), messages.SUCCESS)
        return None
