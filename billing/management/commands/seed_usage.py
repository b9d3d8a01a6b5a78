"""`manage.py seed_usage N`: usage that never happened."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection

from billing.progress import ProgressLine
from billing.seeding import AlreadySeededError, seed_usage


class Command(BaseCommand):
    help = "Enter N invented requests, the same for the same arguments, with their keys, grants and roll-ups."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("records", type=int, metavar="N")
        parser.add_argument("--keys", type=int, default=100, metavar="K")
        parser.add_argument("--days", type=int, default=90, metavar="D")
        parser.add_argument("--until", type=dt.date.fromisoformat, metavar="YYYY-MM-DD", help="Last day; today (UTC).")
        parser.add_argument("--seed", type=int, default=1)

    def handle(self, *args: Any, **options: Any) -> None:
        if min(options["records"], options["keys"], options["days"]) < 1:
            raise CommandError("N, --keys and --days must be 1 or more.")
        until = options["until"] or dt.datetime.now(dt.UTC).date()
        progress, start = ProgressLine(self.stderr, total=options["records"]), time.monotonic()
        try:
            seed_usage(
                options["records"],
                keys=options["keys"],
                days=options["days"],
                until=until,
                seed=options["seed"],
                progress=progress,
            )
        except AlreadySeededError as exc:
            raise CommandError("This database has seeded usage already.") from exc
        progress.close()
        _vacuum()
        self.stdout.write(f"{options['records']:,} records in {time.monotonic() - start:.1f} s")


def _vacuum() -> None:
    """Have PostgreSQL know at once what its autovacuum finds out in a while: how much there is, and where."""
    if connection.vendor == "postgresql" and not connection.in_atomic_block:
        with connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE")
