"""Whether all is well, as the admin's first page says it: each part, how it is, and what to do about it."""

from __future__ import annotations

import datetime as dt
import os
import time
from dataclasses import dataclass
from typing import Literal

from django.conf import settings
from django.core.cache import cache
from django.db import connection
from django.template.defaultfilters import filesizeformat
from django.utils.formats import date_format
from django.utils.timesince import timesince
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from redis.exceptions import RedisError

from billing.models import Purge
from gateway import segments
from gateway.workers import Workers
from proxysite import limiting
from proxysite.task_runs import TaskHealth, task_health
from proxysite.upstream_probe import probe

State = Literal["good", "warn", "bad", "off"]

_JOURNAL_WARN_AGE_S = 30
_JOURNAL_BAD_AGE_S = 120
_PURGE_WARN = dt.timedelta(days=3)
_WORSE_LAST = ("off", "good", "warn", "bad")
_TROUBLE = ("failed", "late")


@dataclass(frozen=True, slots=True)
class Item:
    """One part: its name, how it is, in a few words, and what an operator can do if it is not well."""

    name: str
    state: State
    finding: str
    advice: str = ""


def items(workers: Workers, now: dt.datetime) -> list[Item]:
    """Return all parts that answer at once; the upstream does not (see `upstream`)."""
    tasks = task_health(now)
    return [
        _database(),
        _cache(),
        _gateway(workers),
        _limits(workers),
        _journal(workers),
        _purge(tasks, now),
        _beat(tasks, now),
    ]


def upstream() -> Item:
    """Ask the upstream, or say what it said a moment ago."""
    name = _("Upstream")
    found = probe()
    if found.is_reachable:
        return Item(name, "good", _("answered in %(ms)d ms") % {"ms": round(found.answer_ms)})
    advice = _("No request gets through. Look at UPSTREAM_URL, UPSTREAM_PROXY, and this machine's own network and DNS.")
    return Item(name, "bad", found.trouble, advice)


def _database() -> Item:
    started = time.perf_counter()
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    ms = (time.perf_counter() - started) * 1000
    product = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}.get(connection.vendor, connection.vendor)
    return Item(_("Database"), "good", _("%(product)s, %(ms).1f ms") % {"product": product, "ms": ms})


def _cache() -> Item:
    name = _("Cache")
    product = "Redis" if settings.REDIS_URL else _("memory of each process")
    try:
        cache.set("health", "1", 10)
        works = cache.get("health") == "1"
    except (RedisError, OSError) as exc:
        advice = _("Blocking a key takes up to 10 s longer. Look at REDIS_URL and whether Redis runs.")
        return Item(name, "bad", f"{product}: {type(exc).__name__}", advice)
    if not works:
        return Item(name, "warn", product, _("A value did not come back. Is the cache's memory full?"))
    return Item(name, "good", product)


def _gateway(workers: Workers) -> Item:
    name = _("Gateway")
    if not workers.count:
        advice = _("No worker has reported for 20 s. Look at the log of `manage.py serve`, or start it.")
        return Item(name, "bad", _("no worker"), advice)
    count = ngettext("%(count)d worker", "%(count)d workers", workers.count) % {"count": workers.count}
    return Item(name, "good", count)


def _limits(workers: Workers) -> Item:
    """Whether limits are counted; which keys and networks may come in needs no counting."""
    name = _("Limits")
    product = "Redis" if settings.REDIS_URL else _("memory of one worker")
    if workers.limits_away:
        finding = ngettext("%(count)d worker cannot count", "%(count)d workers cannot count", workers.limits_away) % {
            "count": workers.limits_away
        }
        if settings.ON_LIMITS_UNAVAILABLE == "refuse":
            advice = _("Requests whose limits must be counted are refused. Look at REDIS_URL and whether Redis runs.")
            return Item(name, "bad", finding, advice)
        advice = _("Requests pass without limits meanwhile. Look at REDIS_URL and whether Redis runs.")
        return Item(name, "warn", finding, advice)
    if limiting.uncountable():
        return Item(name, "bad", _("each of several workers counts for itself"), _("Set REDIS_URL, or WORKERS=1."))
    return Item(name, "good", product)


def _journal(workers: Workers) -> Item:
    """The journal of all workers, and of dead ones on this machine."""
    name = _("Journal")
    try:
        found = segments.survey(settings.JOURNAL_DIR)
    except OSError:
        found = []
    size_bytes = max(workers.journal_bytes, sum(report.size_bytes for report in found))
    age_s = max(workers.journal_age_s, segments.oldest_age_s(found, now=time.time()))
    finding = _("%(size)s waiting, the oldest for %(age)d s") % {"size": filesizeformat(size_bytes), "age": age_s}
    if workers.journal_alarms:
        advice = _("Nothing is lost while JOURNAL_DIR takes it. See to the disk and the database first.")
        return Item(name, "bad", "; ".join(workers.journal_alarms), advice)
    if not os.access(settings.JOURNAL_DIR, os.W_OK | os.X_OK):
        return Item(name, "bad", _("the directory is not writable"), _("Give the service's user JOURNAL_DIR to write."))
    if age_s > _JOURNAL_WARN_AGE_S:
        advice = _("Balances lag behind. Does the database take writes? `manage.py journal status` shows the files.")
        return Item(name, "bad" if age_s > _JOURNAL_BAD_AGE_S else "warn", finding, advice)
    return Item(name, "good", finding if size_bytes else _("empty"))


def _purge(tasks: list[TaskHealth], now: dt.datetime) -> Item:
    """When usage records and conversations were purged last; as well as the worse of the two."""
    parts = (_records_purge(now), _conversations_purge(tasks, now))
    return Item(
        _("Last purge"),
        max((part.state for part in parts), key=_WORSE_LAST.index),
        "; ".join(f"{part.name}: {part.finding}" for part in parts),
        " ".join(part.advice for part in parts if part.advice),
    )


def _records_purge(now: dt.datetime) -> Item:
    name = _("usage records")
    last = Purge.objects.order_by("-pk").first()
    keeps = _("Records older than %(days)d days are removed by a daily task.") % {"days": settings.USAGE_RETENTION_DAYS}
    if last is None:
        return Item(name, "off", _("never"), keeps)
    if last.finished_at is None:
        return Item(name, "warn", _("begun, not finished"), _("Run `manage.py purge_usage` to finish it."))
    advice = "" if now - last.started_at < _PURGE_WARN else _("It is overdue. Does Celery beat run?")
    return Item(name, "warn" if advice else "good", _ago(last.finished_at, now), advice)


def _conversations_purge(tasks: list[TaskHealth], now: dt.datetime) -> Item:
    name = _("conversations")
    task = next(task for task in tasks if task.name == "purge_sessions")
    seen = _("never") if task.last_succeeded_at is None else _ago(task.last_succeeded_at, now)
    if task.state in _TROUBLE:
        advice = _("Expired conversations stay on disk: run `manage.py purge_sessions`, and see that Celery runs.")
        return Item(name, "warn", seen, advice)
    return Item(name, "good" if task.state == "ok" else "off", seen)


def _beat(tasks: list[TaskHealth], now: dt.datetime) -> Item:
    """The scheduler's last sign of life, and whether all that it starts ran in time."""
    name = _("Last beat")
    beat = next(task for task in tasks if task.name == "heartbeat")
    advice = _("Purges and price refreshes wait. Start Celery's worker and beat, or look at their log.")
    if beat.last_succeeded_at is None:
        return Item(name, "warn", _("never"), advice)
    seen = _ago(beat.last_succeeded_at, now)
    if beat.state != "ok":
        return Item(name, "bad", seen, advice)
    if failing := [task.name for task in tasks if task.state in _TROUBLE]:
        return Item(name, "warn", seen, _("Look at the task runs of: %(names)s.") % {"names": ", ".join(failing)})
    return Item(name, "good", seen)


def _ago(at: dt.datetime, now: dt.datetime) -> str:
    if now - at < dt.timedelta(minutes=1):
        return _("just now")
    if now - at > dt.timedelta(days=30):
        return date_format(at)
    return _("%(time)s ago") % {"time": timesince(at, now, depth=1)}
