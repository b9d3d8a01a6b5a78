"""The end of a record's life: after USAGE_RETENTION_DAYS its day's sums are all that stays."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable

from django.conf import settings
from django.db import connection
from django.utils import timezone

from billing.models import Purge, UsageRecord
from billing.transactions import in_ledger

_RECORDS_PER_CHUNK = 5_000


def retention_end(today: dt.date) -> dt.date:
    """Return the first day whose records are kept."""
    return today - dt.timedelta(days=settings.USAGE_RETENTION_DAYS)


def purge_usage(
    before: dt.date, *, progress: Callable[[int], None] | None = None, for_at_most_s: float | None = None
) -> int:
    """Remove the records of the days before `before`, in chunks, and return how many those were.

    Roll-ups stay, and are never rebuilt for those days: that is written down before the first record goes. After
    `for_at_most_s` it ends with the chunk, and the next call goes on.
    """
    ends_at = None if for_at_most_s is None else time.monotonic() + for_at_most_s
    purge = in_ledger(lambda: _begun_purge(before), alone=True)
    total = 0
    while removed := in_ledger(lambda: _remove_chunk(before)):
        total += removed
        purge.deleted += removed
        purge.save(update_fields=["deleted"])
        if progress is not None:
            progress(removed)
        if ends_at is not None and time.monotonic() >= ends_at:
            return total
    purge.finished_at = timezone.now()
    purge.save(update_fields=["finished_at"])
    return total


def is_purged(before: dt.date) -> bool:
    """Return whether the last purge up to that day came to its end."""
    latest = Purge.objects.filter(before=before).order_by("-pk").first()
    return latest is not None and latest.finished_at is not None


def _begun_purge(before: dt.date) -> Purge:
    unfinished = Purge.objects.filter(before=before, finished_at=None).order_by("-pk").first()
    return unfinished or Purge.objects.create(before=before)


def _remove_chunk(before: dt.date) -> int:
    # In the order of ids, which is nearly that of time: what is removed is never walked over again.
    table = UsageRecord._meta.db_table
    end = connection.ops.adapt_datetimefield_value(dt.datetime.combine(before, dt.time(), dt.UTC))
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {table} WHERE event_id IN "  # noqa: S608 - the table's name
            f"(SELECT event_id FROM {table} WHERE started_at < %s ORDER BY event_id LIMIT %s)",
            [end, _RECORDS_PER_CHUNK],
        )
        return int(cursor.rowcount)
