"""`manage.py rotate_session_keys`: encrypt conversations anew with the first of SESSION_KEYS."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from billing.progress import ProgressLine
from sessions_api.models import ChatMessage
from sessions_api.services import rotate_session_keys


class Command(BaseCommand):
    help = "Encrypt what older ones of SESSION_KEYS encrypted with the first; then the older ones may go."

    def handle(self, *args: Any, **options: Any) -> None:
        progress = ProgressLine(self.stderr, total=ChatMessage.objects.count())
        done = rotate_session_keys(progress=progress)
        progress.close()
        self.stdout.write(f"{done.examined:,} messages looked at, {done.changed:,} encrypted anew.")
        if done.unreadable:
            raise CommandError(f"{done.unreadable:,} messages open with none of SESSION_KEYS.")
