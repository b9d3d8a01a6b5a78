"""Short transactions, begun anew where two writers collide."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from django.db import OperationalError, connection, transaction

Result = TypeVar("Result")

_ATTEMPTS = 6
_COLLISIONS = ("40001", "40P01")  # serialization_failure, deadlock_detected


def in_transaction(work: Callable[[], Result]) -> Result:
    """Run `work` in one transaction and return what it does; anew if it collided with another writer.

    Inside a transaction of the caller's there is no second attempt.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with transaction.atomic():
                return work()
        except OperationalError as exc:
            has_collided = getattr(exc.__cause__, "sqlstate", None) in _COLLISIONS
            if connection.in_atomic_block or attempt == _ATTEMPTS or not has_collided:
                raise
            time.sleep(random.uniform(0.005, 0.03) * attempt)  # noqa: S311 - no secret
    raise AssertionError("unreachable")
