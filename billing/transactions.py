"""Who may write to the ledger at the same time, and what happens when two writers collide."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from django.db import OperationalError, connection, transaction

Result = TypeVar("Result")

_LEDGER_LOCK = 0x62696C6C  # any number that nobody else in this database uses
_ATTEMPTS = 6
_COLLISIONS = ("40001", "40P01")  # serialization_failure, deadlock_detected


def in_ledger(work: Callable[[], Result], *, alone: bool = False) -> Result:
    """Run `work` in one transaction and return what it does; anew if it collided with another writer.

    With `alone`, nobody else writes to the ledger meanwhile. Inside a transaction of the caller's there is no second
    attempt. SQLite has one writer at a time whatever is asked for.
    """
    if not connection.in_atomic_block:
        connection.close_if_unusable_or_obsolete()  # a database that was away may be back
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with transaction.atomic():
                _lock(alone=alone)
                return work()
        except OperationalError as exc:
            if connection.in_atomic_block or attempt == _ATTEMPTS or not _is_collision(exc):
                raise
            time.sleep(random.uniform(0.005, 0.03) * attempt)  # noqa: S311 - no secret
    raise AssertionError("unreachable")


def release_connection() -> None:
    """Give the thread's connection back, unless a transaction of the caller's is open on it."""
    if not connection.in_atomic_block:
        connection.close()


def _lock(*, alone: bool) -> None:
    if connection.vendor == "postgresql":
        function = "pg_advisory_xact_lock" if alone else "pg_advisory_xact_lock_shared"
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {function}(%s)", [_LEDGER_LOCK])


def _is_collision(exc: OperationalError) -> bool:
    return getattr(exc.__cause__, "sqlstate", None) in _COLLISIONS
