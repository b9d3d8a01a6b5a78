"""Users and their roles; second factors are each user's own and are only removed here."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin as StockGroupAdmin
from django.contrib.auth.admin import UserAdmin as StockUserAdmin
from django.contrib.auth.models import Group, Permission, User
from django.db.models import Exists, Model, OuterRef, Q, QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext, gettext_noop, ngettext
from django.utils.translation import gettext_lazy as _
from django_otp.plugins.otp_static.models import StaticDevice
from django_otp.plugins.otp_totp.models import TOTPDevice
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from billing.admin import confirm
from billing.admin.base import ListAdmin
from proxysite import second_factor

# The stock pages of devices show their secrets.
for model in (User, Group, TOTPDevice, StaticDevice):
    if admin.site.is_registered(model):
        admin.site.unregister(model)


_VERBS = {
    "add": _("Can add %(name)s"),
    "change": _("Can change %(name)s"),
    "delete": _("Can delete %(name)s"),
    "view": _("Can view %(name)s"),
}


def permission_label(permission: Permission) -> str:
    """Return a permission as its reader calls it; its name in the database is English."""
    kind = permission.content_type
    model, verb = kind.model_class(), permission.codename.partition("_")[0]
    if model is None or permission.codename not in {f"{verb}_{model._meta.model_name}" for verb in _VERBS}:
        return f"{kind.app_labeled_name} | {gettext(permission.name)}"
    return f"{model._meta.app_config.verbose_name} | {_VERBS[verb] % {'name': model._meta.verbose_name}}"


def _usable(permissions: QuerySet[Permission]) -> QuerySet[Permission]:
    """Return the permissions for what the admin shows: the others would give nobody anything."""
    shown = [Q(content_type__app_label=m._meta.app_label, content_type__model=m._meta.model_name) for m in _shown()]
    return permissions.filter(functools.reduce(operator.or_, shown))


def _shown() -> Iterable[type[Model]]:
    return admin.site._registry.keys()


class PermissionsMixin(ListAdmin):
    def formfield_for_manytomany(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        field: Any = super().formfield_for_manytomany(db_field, request, **kwargs)
        if db_field.related_model is Permission:
            field.queryset = _usable(field.queryset)
            field.label_from_instance = permission_label
        return field


@admin.register(User)
class UserAdmin(PermissionsMixin, StockUserAdmin, ListAdmin):  # type: ignore[misc,type-arg]  # unfold's types
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "is_active", "is_superuser", "roles", "has_second_factor", "last_login")
    list_filter = ("is_active", "is_superuser", "groups")
    export_fields = ("username", "email", "is_active", "is_staff", "is_superuser", "roles", "last_login", "date_joined")
    actions = ("remove_second_factor",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        devices = TOTPDevice.objects.filter(user=OuterRef("pk"), confirmed=True)
        users: QuerySet[User] = super().get_queryset(request)
        return users.annotate(is_second_factor_set_up=Exists(devices)).prefetch_related("groups")

    @admin.display(description=_("roles"))
    def roles(self, user: User) -> str:
        return ", ".join(group.name for group in user.groups.all())

    @admin.display(description=_("second factor"), boolean=True)
    def has_second_factor(self, user: Any) -> bool:
        return bool(user.is_second_factor_set_up)

    @admin.action(description=_("Remove the second factor, for who has lost it"), permissions=["change"])
    def remove_second_factor(self, request: HttpRequest, users: QuerySet[User]) -> Any:
        if not confirm.is_confirmed(request):
            return confirm.question(
                self,
                request,
                users,
                action="remove_second_factor",
                title=_("Remove second factors"),
                explanation=_("These users log in with their password alone, until they set up a second factor again:"),
            )
        removed = [user for user in users if second_factor.remove(user)]
        for user in removed:
            self.log_change(request, user, gettext_noop("second factor removed"))
        text = ngettext("%d second factor removed.", "%d second factors removed.", len(removed))
        self.message_user(request, text % len(removed), messages.SUCCESS)
        return None


@admin.register(Group)
class RoleAdmin(PermissionsMixin, StockGroupAdmin, ListAdmin):  # type: ignore[misc]
    pass
