"""`manage.py journal status|replay`: the usage events that are on their way to the ledger."""

from __future__ import annotations

import time
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from gateway import segments
from gateway.journal import Journal
from proxysite import ledger


class Command(BaseCommand):
    help = "Show what stands in JOURNAL_DIR, or bring the files of dead workers to the ledger; safe while workers run."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", choices=["status", "replay"])

    def handle(self, *args: Any, **options: Any) -> None:
        if options["action"] == "status":
            self._status()
        else:
            self._replay()

    def _status(self) -> None:
        reports = self._survey()
        now = time.time()
        total_bytes = total_events = 0
        for report in reports:
            events = segments.count_lines(report.path)
            total_bytes += report.size_bytes
            total_events += events
            owner = "live" if segments.is_owned(report.path) else "dead"
            age_s = now - report.written_at
            name = report.path.name
            self.stdout.write(f"{name}  owner {owner}  {report.size_bytes:,} bytes  {events:,} events  {age_s:.0f} s")
        oldest_s = segments.oldest_age_s(reports, now=now)
        self.stdout.write(
            f"{len(reports):,} files, {total_bytes:,} bytes, {total_events:,} events, the oldest for {oldest_s:.0f} s"
        )
        if lines := segments.count_lines(settings.JOURNAL_DIR / segments.SET_ASIDE_NAME):
            self.stdout.write(f"{lines:,} events set aside in {segments.SET_ASIDE_NAME}: the ledger refuses them")

    def _replay(self) -> None:
        self._survey()
        journal = Journal(
            settings.JOURNAL_DIR,
            sink=ledger.record,
            flush_interval_s=settings.JOURNAL_FLUSH_SECONDS,
            max_bytes=settings.JOURNAL_MAX_BYTES,
        )
        done = journal.replay()
        self.stdout.write(
            f"{done.recorded:,} recorded, {done.duplicates:,} there already, "
            f"{done.rejected:,} refused, {done.corrupt:,} damaged lines"
        )
        if done.files:
            raise CommandError(f"The ledger takes no events now; {done.files:,} files stay for a later replay.")

    def _survey(self) -> list[segments.SegmentReport]:
        try:
            return segments.survey(settings.JOURNAL_DIR)
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise CommandError(f"JOURNAL_DIR cannot be read ({exc.strerror}).") from exc
