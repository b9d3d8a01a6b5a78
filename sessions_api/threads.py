"""The database for code on the event loop: short work on a few threads, each with a connection of its own.

Django's own `sync_to_async` would put all of it on one thread, behind whatever the site's pages do there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from django.db import Error, connection

Result = TypeVar("Result")

_THREADS = 4


class Threads:
    """Runs work that touches the database; for one event loop."""

    def __init__(self) -> None:
        # SQLite has one writer at a time: more threads would only wait for each other, and not in order.
        count = 1 if connection.vendor == "sqlite" else _THREADS
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="conversations")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return what `work` does. Whoever is cancelled meanwhile learns of it once the work has ended."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, _connected, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await asyncio.shield(future)
            raise

    def close(self) -> None:
        """Let work that has begun end; what waits is not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _connected(work: Callable[[], Result]) -> Result:
    try:
        connection.ensure_connection()
        connection.close_at = None
        return work()
    except Error:
        connection.close()
        raise
    finally:
        if connection.vendor != "sqlite":
            # Back into the pool, which the site's pages share. A file is kept open: to open SQLite's takes longer
            # than the work, and to close it writes the log back into the database.
            connection.close()
