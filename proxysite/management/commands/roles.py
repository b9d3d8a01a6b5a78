"""`manage.py roles`: make the operators' roles."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from proxysite.roles import make_roles


class Command(BaseCommand):
    help = "Make the roles operator, accountant and support, with exactly their rights; a second run changes nothing."

    def handle(self, *args: Any, **options: Any) -> None:
        for role in make_roles():
            done = "made or put right" if role.has_changed else "as it should be"
            self.stdout.write(f"{role.name}: {role.permissions} permissions, {done}")
