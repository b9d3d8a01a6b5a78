"""`manage.py setup`: make an instance ready to serve."""

from __future__ import annotations

import os
import secrets
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import BaseCommand

from proxysite.roles import make_roles

FIRST_OPERATOR = "admin"


class Command(BaseCommand):
    help = "Migrate the database, make the roles, and create the first operator with a random password, printed once."

    def handle(self, *args: Any, **options: Any) -> None:
        os.umask(0o077)  # the database is the operator's own
        call_command("migrate", interactive=False, verbosity=0)
        make_roles()
        users = get_user_model()
        if users.objects.exists():
            return
        password = secrets.token_urlsafe(15)
        users.objects.create_superuser(FIRST_OPERATOR, password=password)
        self.stdout.write(
            f"First operator: {FIRST_OPERATOR} / {password}\n"
            "This password is shown only now; change it with `manage.py changepassword admin`."
        )
