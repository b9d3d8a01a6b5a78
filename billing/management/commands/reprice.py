"""`manage.py reprice --since YYYY-MM-DD`: rate records by the prices known now."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from billing.progress import ProgressLine
from billing.repricing import records_to_reprice
from billing.services import reprice


class Command(BaseCommand):
    help = "Rate records anew, unpriced ones too, by the prices of their time; a second run changes nothing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--since", type=dt.date.fromisoformat, required=True, metavar="YYYY-MM-DD")
        parser.add_argument("--model", metavar="NAME", help="Only this model, or all that begin with NAME*.")

    def handle(self, *args: Any, **options: Any) -> None:
        since = dt.datetime.combine(options["since"], dt.time(), dt.UTC)
        total = records_to_reprice(since, model=options["model"]).count()
        progress = ProgressLine(self.stderr, total=total)
        done = reprice(since, model=options["model"], progress=progress)
        progress.close()
        self.stdout.write(f"{done.examined:,} records looked at, {done.changed:,} rated differently.")
