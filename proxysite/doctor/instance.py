"""What can be seen without leaving this machine: settings, secrets, database, Redis, beat, journal."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from django.conf import settings
from django.core import checks
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone

from gateway import segments
from proxysite import env, limiting
from proxysite.celery import app
from proxysite.checks import OF_SETTINGS
from proxysite.doctor.findings import Check, Finding, error, ok, warning
from proxysite.models import TaskRun

_STRONG_CHARS, _STRONG_DISTINCT = 32, 10
_TOKEN_CHARS = 16
_FREE_LEAST_BYTES = 100 << 20
_JOURNAL_LATE_S, _JOURNAL_STUCK_S = 30, 120
_BEAT_TASK = "proxysite.tasks.heartbeat"
_BEAT_LATE = dt.timedelta(minutes=5)
_PATIENCE_S = 5.0
_CLOCKS_APART_S = 10.0
# Where containers get their secrets: readable for their one user, whoever that is.
_CONTAINERS_SECRETS = Path("/run/secrets")
_WRITING_CURES: dict[type[Exception], str] = {
    redis.OutOfMemoryError: "Raise Redis's maxmemory, and let it drop what expires: maxmemory-policy volatile-lru.",
    redis.ReadOnlyError: "Let REDIS_URL name the primary: this is a replica.",
    redis.exceptions.NoPermissionError: "Let REDIS_URL's user write all keys that begin with REDIS_KEY_PREFIX.",
}


def instance_checks() -> list[tuple[str, Check]]:
    return [
        ("settings", _settings),
        ("secrets", _secrets),
        ("database", _database),
        ("redis", _redis),
        ("broker", _broker),
        ("beat", _beat),
        ("journal", _journal),
    ]


def is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


# Settings


def _settings() -> Iterator[Finding]:
    found = [*_system_checks(), *_exposure(), *_processes()]
    yield from found or [ok("settings", f"{settings.WORKERS} workers, upstream {settings.UPSTREAM_URL}")]


def _system_checks() -> Iterator[Finding]:
    for message in checks.run_checks(tags=OF_SETTINGS):
        if message.level >= checks.WARNING:
            make = error if message.level >= checks.ERROR else warning
            yield make("settings", f"{message.id}: {message.msg}", message.hint or "See the message.")


def _exposure() -> Iterator[Finding]:
    is_open = bool(settings.PUBLIC_URL) or not is_loopback(settings.HOST)
    if settings.DEBUG:
        make = error if is_open else warning
        yield make("settings", "DEBUG shows source code and settings to whoever meets an error", "Unset DEBUG.")
    if is_open and "*" in settings.ALLOWED_HOSTS:
        yield warning("settings", "the site answers to any host name", "Set PUBLIC_URL, or ALLOWED_HOSTS.")
    if "*" in settings.TRUSTED_PROXIES:
        cure = "List the addresses of your reverse proxies in TRUSTED_PROXIES."
        yield error("settings", "everybody may say who they are: TRUSTED_PROXIES is *", cure)
    for name, url in (("PUBLIC_URL", settings.PUBLIC_URL), ("UPSTREAM_URL", settings.UPSTREAM_URL)):
        parts = urlsplit(url)
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            yield warning("settings", f"keys travel in the clear: {name} is http://", f"Use https:// in {name}.")
    if settings.METRICS_TOKEN and len(settings.METRICS_TOKEN) < _TOKEN_CHARS:
        cure = "Use 32 random characters: openssl rand -hex 16"
        yield warning("settings", f"METRICS_TOKEN has less than {_TOKEN_CHARS} characters", cure)


def _processes() -> Iterator[Finding]:
    try:
        trouble = limiting.uncountable()
    except DatabaseError:
        return  # the database is a part of its own
    if trouble and not limiting.uncountable_settings():  # which is a system check
        yield error("settings", trouble, "Set REDIS_URL, or WORKERS=1.")


# Secrets


def _secrets() -> Iterator[Finding]:
    found = [*_weak_secrets(), *_modes()]
    yield from found or [ok("secrets", "strong, and readable by their owner only")]


def _weak_secrets() -> Iterator[Finding]:
    secrets = [
        ("SECRET_KEY", settings.SECRET_KEY, "ends all logins"),
        ("KEY_PEPPER", settings.KEY_PEPPER, "loses who owned which usage"),
        *(("SESSION_KEYS", value, "ends all conversations") for value in settings.SESSION_KEYS),
    ]
    for name, value, loss in secrets:
        if len(value) < _STRONG_CHARS or len(set(value)) < _STRONG_DISTINCT or value.startswith("django-insecure"):
            cure = f"Replace it by `openssl rand -base64 48`. Mind that this {loss}."
            yield error("secrets", f"{name} can be guessed", cure)
    if settings.SECRET_KEY == settings.KEY_PEPPER:
        yield error("secrets", "SECRET_KEY and KEY_PEPPER are the same", "Replace SECRET_KEY: that only ends logins.")


def _modes() -> Iterator[Finding]:
    owned = [("secret_key", error), ("key_pepper", error), ("session_keys", error), ("db.sqlite3", warning)]
    paths = [(settings.VAR_DIR, warning), *((settings.VAR_DIR / name, make) for name, make in owned)]
    named = [(path, error) for path in env.files_read.values() if _CONTAINERS_SECRETS not in path.parents]
    for path, make in [*paths, (settings.JOURNAL_DIR, warning), *named]:
        if path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            cure = f"chmod {'700' if path.is_dir() else '600'} {path}"
            yield make("secrets", f"others than its owner may reach {path} (mode {mode:o})", cure)


# Database and Redis


def _database() -> Iterator[Finding]:
    started = time.perf_counter()
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            ms = (time.perf_counter() - started) * 1000
            product, trouble = _sqlite(cursor) if connection.vendor == "sqlite" else _postgres(cursor)
    except Exception as exc:  # by name: the message holds the address
        cure = "Look at DATABASE_URL, and whether the database runs and lets this machine in."
        yield error("database", f"not reachable: {type(exc).__name__}", cure)
        return
    yield ok("database", f"{product}, answers in {ms:.1f} ms")
    yield from trouble
    executor = MigrationExecutor(connection)
    if pending := executor.migration_plan(executor.loader.graph.leaf_nodes()):
        yield error("database", f"{len(pending)} migrations are pending", "Run `manage.py migrate`.")


def _sqlite(cursor: Any) -> tuple[str, list[Finding]]:
    cursor.execute("SELECT sqlite_version()")
    version = cursor.fetchone()[0]
    cursor.execute("PRAGMA journal_mode")
    mode = cursor.fetchone()[0]
    cure = "Put VAR_DIR on a local disk: network file systems have no write-ahead log."
    trouble = [] if mode == "wal" else [error("database", f"readers wait for writers: journal mode {mode}", cure)]
    path = Path(connection.settings_dict["NAME"])
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        trouble.append(error("database", f"{path} takes no writes", "Give the service's user the file and VAR_DIR."))
    return f"SQLite {version}", trouble


def _postgres(cursor: Any) -> tuple[str, list[Finding]]:
    cursor.execute(
        "SELECT current_setting('server_version'), current_setting('transaction_read_only'),"
        " extract(epoch FROM clock_timestamp())"
    )
    version, is_read_only, now_s = cursor.fetchone()
    trouble = _apart("PostgreSQL", float(now_s))
    if is_read_only == "on":
        cure = "Let DATABASE_URL name the primary: this is a replica, or set to default_transaction_read_only."
        trouble.append(error("database", "it takes no writes", cure))
    return f"PostgreSQL {version}", trouble


def _apart(whose: str, now_s: float) -> list[Finding]:
    offset_s = time.time() - now_s
    if abs(offset_s) < _CLOCKS_APART_S:
        return []
    said = f"{abs(offset_s):.0f} s {'ahead of' if offset_s > 0 else 'behind'} {whose}'s"
    return [warning("clock", said, "Let chrony or systemd-timesyncd set the clocks of both machines.")]


def _redis() -> Iterator[Finding]:
    if not settings.REDIS_URL:
        yield ok("redis", "not used: memory of each process")
        return
    started = time.perf_counter()
    try:
        with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=2, socket_connect_timeout=2) as client:
            client.ping()
            ms = (time.perf_counter() - started) * 1000
            trouble = _no_writes(client)
            about: Any = client.info("server")
            seconds, _ = client.time()
    except (redis.RedisError, OSError) as exc:
        cure = "Look at REDIS_URL, and whether Redis runs and lets this machine in."
        yield error("redis", f"not reachable: {type(exc).__name__}", cure)
        return
    yield from trouble or [ok("redis", f"Redis {about['redis_version']}, answers in {ms:.1f} ms")]
    yield from _apart("Redis", float(seconds))


def _no_writes(client: redis.Redis) -> list[Finding]:
    """Write a key and take it away again: a Redis that is full, or a replica, answers everything but that."""
    name = f"{settings.REDIS_KEY_PREFIX}:doctor:{os.urandom(8).hex()}"
    try:
        client.set(name, b"x", ex=60)
        client.delete(name)
    except redis.ResponseError as exc:
        said = f"it answers, and takes no writes: {type(exc).__name__}"
        return [error("redis", said, _WRITING_CURES.get(type(exc), "Look at Redis's log: is its disk full?"))]
    return []


def _broker() -> Iterator[Finding]:
    """Celery's messages; beside the gateway they are files, which the beat tells of."""
    if not urlsplit(settings.CELERY_BROKER_URL).scheme.startswith(("redis", "amqp")):
        return
    try:
        with app.connection_for_write(connect_timeout=_PATIENCE_S) as broker:
            broker.ensure_connection(max_retries=1, timeout=_PATIENCE_S)
    except Exception as exc:  # of two libraries; by name, since messages hold the address
        cure = "Look at CELERY_BROKER_URL, and whether the broker runs and lets this machine in."
        yield error("broker", f"not reachable: {type(exc).__name__}", cure)
        return
    yield ok("broker", "Celery's broker is reached")


# Beat and journal


def _beat() -> Iterator[Finding]:
    """The scheduler's last sign of life: its task writes down that it ran."""
    cure = "Start Celery's worker and beat, or look at their log: nothing is purged or refreshed meanwhile."
    try:
        run = TaskRun.objects.filter(task=_BEAT_TASK).first()
    except DatabaseError:
        return  # the database is a part of its own
    if run is None or run.last_succeeded_at is None:
        yield warning("beat", "has never run", cure)
        return
    age = timezone.now() - run.last_succeeded_at
    said = f"last ran {round(age.total_seconds())} s ago"
    yield error("beat", said, cure) if age > _BEAT_LATE else ok("beat", said)


def _journal() -> Iterator[Finding]:
    directory: Path = settings.JOURNAL_DIR
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix="doctor-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        cure = "Give the service's user JOURNAL_DIR to write, on a disk that survives the process."
        yield error("journal", f"{directory} cannot be written ({exc.strerror})", cure)
        return
    found = segments.survey(directory)
    age_s = segments.oldest_age_s(found, now=time.time())
    depth = f"{sum(report.size_bytes for report in found):,} bytes wait in {len(found)} files"
    if age_s > _JOURNAL_LATE_S:
        make = error if age_s > _JOURNAL_STUCK_S else warning
        cure = "Does the database take writes? `manage.py journal status` shows the files, `replay` brings them."
        yield make("journal", f"{depth}, the oldest for {age_s:.0f} s", cure)
    else:
        yield ok("journal", f"writable, {depth}")
    if lines := segments.count_lines(directory / segments.SET_ASIDE_NAME):
        cure = f"Look at {directory / segments.SET_ASIDE_NAME}; renamed to end in {segments.SUFFIX} it is tried again."
        yield warning("journal", f"{lines} usage events were refused by the ledger", cure)
    yield from _disk(directory)


def _disk(directory: Path) -> Iterator[Finding]:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < settings.JOURNAL_MAX_BYTES:
        make = error if free_bytes < _FREE_LEAST_BYTES else warning
        cure = "Free some, or lower JOURNAL_MAX_BYTES: a journal that cannot grow keeps events in memory only."
        yield make("journal", f"only {free_bytes >> 20:,} MiB are free at {directory}", cure)
