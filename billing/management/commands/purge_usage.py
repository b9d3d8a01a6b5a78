"""`manage.py purge_usage`: remove records whose retention has ended."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.retention import retention_end
from billing.services import purge_usage


class Command(BaseCommand):
    help = "Remove records older than USAGE_RETENTION_DAYS, or than --before, in chunks; roll-ups stay."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--before", type=dt.date.fromisoformat, metavar="YYYY-MM-DD")

    def handle(self, *args: Any, **options: Any) -> None:
        today = dt.datetime.now(dt.UTC).date()
        before = options["before"] or retention_end(today)
        if before > today - dt.timedelta(days=settings.USAGE_WINDOW_DAYS):
            raise CommandError(f"The last {settings.USAGE_WINDOW_DAYS} days (USAGE_WINDOW_DAYS) must stay.")
        self.stdout.write(f"{purge_usage(before):,} records from before {before} removed.")
