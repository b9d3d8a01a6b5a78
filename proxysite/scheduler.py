"""Celery's beat on the database: the schedule that operators see, and may switch off by entry, in the admin."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from django_celery_beat.schedulers import DatabaseScheduler, ModelEntry

from proxysite.schedule import DESCRIPTION, entries

_LONG_AGO = dt.timedelta(days=3650)


class _Entry(ModelEntry):
    """An entry whose first run is due at once, not one interval after the first start."""

    def __init__(self, model: Any, app: Any = None) -> None:
        has_never_run = model.last_run_at is None and model.description == DESCRIPTION
        super().__init__(model, app=app)
        if has_never_run:
            self.last_run_at = model.last_run_at = timezone.now() - _LONG_AGO

    def is_due(self) -> Any:
        """Count from now where the last run lies ahead: the clock was set back since, and may have been far off."""
        now = timezone.now()
        if self.last_run_at > now:
            self.last_run_at = self.model.last_run_at = now
        return super().is_due()


class Scheduler(DatabaseScheduler):
    """Brings the entries of `proxysite.schedule` into the database before it reads it."""

    Entry = _Entry
    _ticked_at = 0.0

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        """Send what is due. Whenever the clock was set back, when that is must be reckoned anew."""
        now = time.time()
        if now < self._ticked_at:
            self._heap = None
        self._ticked_at = now
        return super().tick(*args, **kwargs)

    def setup_schedule(self) -> None:
        wanted = entries()
        PeriodicTask.objects.filter(description=DESCRIPTION).exclude(name__in=wanted).delete()
        self.update_from_dict(
            {
                name: {
                    "task": entry.task,
                    "schedule": dt.timedelta(seconds=entry.every_s),
                    "options": {"expire_seconds": entry.expires_s},
                    "description": DESCRIPTION,
                }
                for name, entry in wanted.items()
            }
        )
