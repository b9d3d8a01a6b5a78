"""Turns of this worker: who waits for a session here, and leases that last as long as their turns do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from django.conf import settings
from django.db import Error
from django.utils import timezone

from sessions_api import services
from sessions_api.threads import Threads
from sessions_api.turns import SessionBusyError, Turn

logger = logging.getLogger("sessions_api.chat")

_RENEWALS_PER_LEASE = 3


class Queues:
    """Who waits for the same session in this worker, first come first served; one of them asks the database."""

    def __init__(self) -> None:
        self._locks: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def first_of(self, session: tuple[str, str], *, timeout_s: float) -> AsyncIterator[Callable[[], None]]:
        """Enter once nobody before us is there any more, with a function that lets the next one in early.

        Raises SessionBusyError after `timeout_s`.
        """
        lock, waiting = self._locks.get(session) or (asyncio.Lock(), 0)
        self._locks[session] = lock, waiting + 1
        with contextlib.ExitStack() as place:
            place.callback(self._leave, session)
            try:
                async with asyncio.timeout(timeout_s):
                    await lock.acquire()
            except TimeoutError:
                raise SessionBusyError from None
            place.callback(lock.release)
            yield place.close  # what it has done is not done again at the end

    def _leave(self, session: tuple[str, str]) -> None:
        lock, waiting = self._locks[session]
        if waiting == 1:
            del self._locks[session]
        else:
            self._locks[session] = lock, waiting - 1


class Abandonment:
    """What frees the session of a turn that is not stored, once: when the turn ends, or in a task before that."""

    def __init__(self, free: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._free = free
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Free the session now; `complete` waits for it."""
        if self._task is None:
            self._task = asyncio.create_task(self._free())

    async def complete(self) -> None:
        """Return once the session is free."""
        await (self._task or self._free())


class LeaseKeeper:
    """Renews the leases of all turns under way, with one statement now and then, for as long as there are any."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._turns: dict[str, Turn] = {}
        self._task: asyncio.Task[None] | None = None

    def hold(self, turn: Turn) -> None:
        self._turns[turn.token] = turn
        if self._task is None:
            self._task = asyncio.create_task(self._keep())

    def let_go(self, token: str) -> None:
        self._turns.pop(token, None)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _keep(self) -> None:
        pause_s = settings.SESSION_LEASE_SECONDS / _RENEWALS_PER_LEASE
        while self._turns:
            await asyncio.sleep(pause_s)
            turns = list(self._turns.values())
            try:
                if turns:
                    await self._threads.run(lambda turns=turns: services.renew_leases(turns, now=timezone.now()))  # type: ignore[misc]
            except Error as exc:
                # The next time may succeed before they end; if not, somebody else may take the sessions.
                logger.warning("leases were not renewed: %s", type(exc).__name__)
        self._task = None
