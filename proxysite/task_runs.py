"""Who ran when: every task's last run is written down by Celery's signals, in whatever process it runs."""

from __future__ import annotations

import datetime as dt
import logging
import time
from dataclasses import dataclass
from typing import Any

from celery import signals
from django.db import DatabaseError
from django.utils import timezone
from django_celery_beat.models import PeriodicTask

from proxysite.models import DETAIL_MAX_CHARS, TaskRun
from proxysite.schedule import entries

logger = logging.getLogger(__name__)

# A task is late if it has not succeeded for two intervals and this, which start and restart may take.
_GRACE_S = 60

_begun_at: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class TaskHealth:
    """How a scheduled task fares. `state`: ok, failed (its last run), late, never (yet), off (in the admin)."""

    name: str
    task: str
    state: str
    last_succeeded_at: dt.datetime | None
    age_s: int | None


def task_health(now: dt.datetime) -> list[TaskHealth]:
    """Return every scheduled task's health, in two queries."""
    scheduled = entries()
    runs = {run.task: run for run in TaskRun.objects.filter(task__in=[entry.task for entry in scheduled.values()])}
    switched_off = set(PeriodicTask.objects.filter(name__in=scheduled, enabled=False).values_list("name", flat=True))
    found = []
    for name, entry in scheduled.items():
        run = runs.get(entry.task)
        succeeded_at = run.last_succeeded_at if run else None
        age_s = None if succeeded_at is None else max(0, round((now - succeeded_at).total_seconds()))
        state = "off" if name in switched_off else _state(run, age_s, late_after_s=2 * entry.every_s + _GRACE_S)
        found.append(TaskHealth(name, entry.task, state, succeeded_at, age_s))
    return found


def _state(run: TaskRun | None, age_s: int | None, *, late_after_s: int) -> str:
    if run is None:
        return "never"
    if age_s is not None and age_s > late_after_s:
        return "late"
    if run.outcome == TaskRun.Outcome.FAILED:
        return "failed"
    return "ok" if age_s is not None else "never"


def listen() -> None:
    """Write down every run of this process from now on."""
    signals.task_prerun.connect(_note_start)
    signals.task_postrun.connect(_note_end)


def _note_start(task_id: str, task: Any, **_: object) -> None:
    _begun_at[task_id] = time.monotonic()
    _write(task.name, outcome=TaskRun.Outcome.RUNNING, last_started_at=timezone.now())


def _note_end(task_id: str, task: Any, state: str | None, retval: object, **_: object) -> None:
    now = timezone.now()
    duration_s = time.monotonic() - _begun_at.pop(task_id, time.monotonic())
    ending = {"last_finished_at": now, "duration_ms": round(duration_s * 1000)}
    if state == "SUCCESS":
        rows = retval if isinstance(retval, int) else None
        _write(task.name, outcome=TaskRun.Outcome.SUCCEEDED, last_succeeded_at=now, rows=rows, detail="", **ending)
    else:
        _write(task.name, outcome=TaskRun.Outcome.FAILED, rows=None, detail=_told(retval), **ending)


def _told(failure: object) -> str:
    """Return an exception in one line: the first, because a database names the values of a row in the next."""
    lines = f"{type(failure).__name__}: {failure}".splitlines()
    return lines[0].removesuffix(": ")[:DETAIL_MAX_CHARS]


def _write(task: str, **values: object) -> None:
    try:
        if not TaskRun.objects.filter(task=task).update(**values):
            TaskRun.objects.get_or_create(task=task, defaults={"last_started_at": timezone.now(), **values})
    except DatabaseError as exc:
        # The task itself will say more of it, or has done its work all the same.
        logger.warning("a run of %s was not written down: %s", task, type(exc).__name__)
