"""The roles that operators may have, as groups of permissions; a superuser may do everything without one.

Only superusers change users and roles: whoever could would give himself any right.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.contrib.auth.models import Group, Permission
from django.db import transaction
from django.db.models import Q

_EVERYTHING = ("add", "change", "delete", "view")

# App, and either permissions by name, or verbs that stand for all of its models. Apps that are not installed, such as
# a scheduler, give nobody a right.
ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "operator": {
        "billing": (*_EVERYTHING, "export_lists"),
        "sessions_api": ("view_chatsession", "delete_chatsession"),
        "proxysite": ("view",),
        "gateway": ("view",),
        "django_celery_beat": _EVERYTHING,
        "axes": ("view", "delete_accessattempt"),
        "auth": ("view_user", "view_group"),
        "admin": ("view_logentry",),
    },
    "accountant": {
        "billing": (
            "view",
            "add_grant",
            "change_grant",
            "add_modelprice",
            "change_modelprice",
            "delete_modelprice",
            "export_lists",
        ),
    },
    "support": {"billing": ("view",), "sessions_api": ("view_chatsession",)},
}


@dataclass(frozen=True, slots=True)
class RoleChange:
    """What making a role came to."""

    name: str
    permissions: int
    has_changed: bool


def make_roles() -> list[RoleChange]:
    """Give each role's group exactly its permissions, made if it is not there; a second run changes nothing."""
    return [_make_role(name, granted) for name, granted in ROLES.items()]


@transaction.atomic
def _make_role(name: str, granted: dict[str, tuple[str, ...]]) -> RoleChange:
    group, is_new = Group.objects.get_or_create(name=name)
    wanted = {permission.pk for app, names in granted.items() for permission in _permissions(app, names)}
    present = set(group.permissions.values_list("pk", flat=True))
    if wanted != present:
        group.permissions.set(wanted)
    return RoleChange(name, len(wanted), is_new or wanted != present)


def _permissions(app: str, names: tuple[str, ...]) -> list[Permission]:
    condition = Q(codename__in=names)
    for name in names:
        if "_" not in name:
            condition |= Q(codename__startswith=f"{name}_")
    return list(Permission.objects.filter(condition, content_type__app_label=app))
