"""Whether this instance is ready to serve."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.cache import cache
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from django.http import HttpRequest, JsonResponse
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe

from gateway import journal, segments
from proxysite.task_runs import task_health

_JOURNAL_AGE_MOST_S = 60


@csrf_exempt
@never_cache
@require_safe
async def readyz(request: HttpRequest) -> JsonResponse:
    """Answer 200, or 503 with the parts that are bad: `{"status", "checks": {part: "ok" or what is wrong}, …}`.

    The depth of the `"journal"` is that of all workers, its alarms are those of the worker that was asked. `"tasks"`
    says when each periodic task last succeeded; a late one is to be seen, and takes no gateway out of rotation.
    """
    checks = await sync_to_async(readiness)()
    is_ready = all(finding == "ok" for finding in checks.values())
    answer = {
        "status": "ok" if is_ready else "error",
        "checks": checks,
        "journal": await sync_to_async(_journal_depth)(),
        "tasks": await sync_to_async(_tasks)() if checks["database"] == "ok" else {},
    }
    return JsonResponse(answer, status=200 if is_ready else 503)


def readiness() -> dict[str, str]:
    """Return what is wrong with each part that serving needs, "ok" where nothing is."""
    database = _finding(_database)
    return {
        "database": database,
        "migrations": _finding(_migrations) if database == "ok" else "not known without the database",
        "cache": _finding(_cache),
        "journal": _finding(_journal),
    }


def _finding(check: Callable[[], str]) -> str:
    try:
        return check() or "ok"
    except Exception as exc:  # a health check reports whatever is wrong, by name: messages may hold addresses
        return f"failed: {type(exc).__name__}"


def _database() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return ""


def _migrations() -> str:
    executor = MigrationExecutor(connection)
    pending = executor.migration_plan(executor.loader.graph.leaf_nodes())
    return f"{len(pending)} pending" if pending else ""


def _cache() -> str:
    cache.set("readyz", "1", 10)
    return "" if cache.get("readyz") == "1" else "a value did not come back"


def _journal() -> str:
    if alarms := journal.alarms():
        return "; ".join(alarms)
    directory = settings.JOURNAL_DIR
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        return "the directory is not writable"
    oldest_age_s = _journal_depth()["oldest_age_s"]
    return f"events have been waiting for {oldest_age_s} s" if oldest_age_s > _JOURNAL_AGE_MOST_S else ""


def _tasks() -> dict[str, dict[str, object]]:
    """Return each periodic task's state; nothing before the migrations, which are a finding of their own."""
    try:
        healths = task_health(timezone.now())
    except DatabaseError:
        return {}
    return {
        health.name: {"state": health.state, "last_succeeded_at": health.last_succeeded_at, "age_s": health.age_s}
        for health in healths
    }


def _journal_depth() -> dict[str, int]:
    """Return what is on its way to the ledger, from all workers."""
    try:
        found = segments.survey(settings.JOURNAL_DIR)
    except OSError:
        found = []
    return {
        "files": len(found),
        "bytes": sum(report.size_bytes for report in found),
        "oldest_age_s": round(segments.oldest_age_s(found, now=time.time())),
    }
