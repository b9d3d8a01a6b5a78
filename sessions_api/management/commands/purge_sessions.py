"""`manage.py purge_sessions`: remove the conversations that have expired."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from sessions_api.services import purge_expired_sessions


class Command(BaseCommand):
    help = "Remove expired conversations, in chunks, while others go on; a task does the same every minute."

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"{purge_expired_sessions():,} conversations removed.")
