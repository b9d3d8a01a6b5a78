"""What each gateway worker says of itself every few seconds, and what all of them say together."""

from __future__ import annotations

import datetime as dt
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from django.db import DatabaseError, connection
from django.utils import timezone

from gateway.journal import JournalStatus
from gateway.models import WorkerState

logger = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
# Three reports may be missed, by a worker that is busy or a database that is.
_STALE_AFTER = dt.timedelta(seconds=4 * REPORT_SECONDS)
_FORGOTTEN_AFTER = dt.timedelta(hours=1)
_FAREWELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Workers:
    """All workers that live: how many, what they have open, and what stands in their journals."""

    count: int
    open_streams: int
    journal_bytes: int
    journal_age_s: float
    journal_alarms: tuple[str, ...]
    limits_away: int = 0  # of how many


def live_workers(now: dt.datetime) -> Workers:
    """Return the sum of what was said lately, in one query."""
    said = list(WorkerState.objects.filter(seen_at__gt=now - _STALE_AFTER))
    return Workers(
        count=len(said),
        open_streams=sum(state.open_streams for state in said),
        journal_bytes=sum(state.journal_bytes for state in said),
        journal_age_s=max((state.journal_age_s for state in said), default=0.0),
        journal_alarms=tuple(sorted({state.journal_alarm for state in said if state.journal_alarm})),
        limits_away=sum(state.limits_away for state in said),
    )


class WorkerReport:
    """Says how this worker fares, from a thread of its own: neither a stream nor the journal waits for it."""

    def __init__(
        self,
        *,
        open_streams: Callable[[], int],
        journal: Callable[[], JournalStatus],
        limits_away: Callable[[], bool] = bool,
    ) -> None:
        self._open_streams = open_streams
        self._journal = journal
        self._limits_away = limits_away
        self._worker = f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._is_stopping = threading.Event()
        # A daemon: a database that does not answer must not keep the process.
        self._thread = threading.Thread(target=self._run, name="worker-report", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take back what was said, unless the database keeps us waiting."""
        self._is_stopping.set()
        self._thread.join(_FAREWELL_SECONDS)

    def _run(self) -> None:
        failed = False
        while True:
            is_last = self._is_stopping.is_set()
            try:
                self._forget() if is_last else self._say()
                failed = False
            except DatabaseError as exc:
                if not failed:
                    logger.warning("this worker's state was not written down: %s", type(exc).__name__)
                failed = True
            finally:
                connection.close()
            if is_last:
                return
            self._is_stopping.wait(REPORT_SECONDS)

    def _say(self) -> None:
        now = timezone.now()
        journal = self._journal()
        WorkerState.objects.update_or_create(
            worker=self._worker,
            defaults={
                "seen_at": now,
                "open_streams": self._open_streams(),
                "journal_bytes": journal.bytes,
                "journal_age_s": journal.oldest_age_s,
                "journal_alarm": journal.alarm[:300],
                "limits_away": self._limits_away(),
            },
        )
        WorkerState.objects.filter(seen_at__lt=now - _FORGOTTEN_AFTER).delete()

    def _forget(self) -> None:
        WorkerState.objects.filter(worker=self._worker).delete()
