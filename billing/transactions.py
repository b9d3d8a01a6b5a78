"""Who may write to the ledger at the same time, and what happens when two writers collide."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def give_up_waiting_after(seconds: float) -> None:
    """Have the current transaction fail once it has waited so long for a row or table that somebody else has locked.

    SQLite has a time limit of its own, that of its connections.
    """
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{round(seconds * 1000)}ms"])


@contextmanager
def reading_impatiently(seconds: float) -> Iterator[None]:
    """What is read within fails instead of waiting longer for what others have locked.

    That takes a transaction, which on SQLite would be a writer's; there readers wait for nobody.
    """
    if connection.vendor == "sqlite":
        yield
        return
    with transaction.atomic():
        give_up_waiting_after(seconds)
        yield


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
