"""`manage.py rebuild_usage`: make the sums by the day again from the records."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Max, Min

from billing.models import UsageDay
from billing.services import rebuild_usage_days


class Command(BaseCommand):
    help = "Make the roll-ups again from the records; days whose records were purged stay as they are."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--start", type=dt.date.fromisoformat, metavar="YYYY-MM-DD", help="The first day there is.")
        parser.add_argument("--end", type=dt.date.fromisoformat, metavar="YYYY-MM-DD", help="The last day there is.")

    def handle(self, *args: Any, **options: Any) -> None:
        known = UsageDay.objects.aggregate(start=Min("day"), end=Max("day"))
        start, end = (options[name] or known[name] for name in ("start", "end"))
        if start is None or end is None:
            raise CommandError("There are no roll-ups: name --start and --end.")
        self.stdout.write(f"{rebuild_usage_days(start, end):,} days rebuilt.")
