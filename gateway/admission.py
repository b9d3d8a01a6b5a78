"""What operators have decided, brought to a worker: now and then, and at once where it is announced."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import redis.asyncio
from redis.exceptions import RedisError

logger = logging.getLogger("gateway.admission")

_RECONNECT_SECONDS = 5.0


Decided = TypeVar("Decided")


class Policy(Generic[Decided]):
    """What operators have decided, as each worker knows it: read by `load` now and then, never for a request.

    `apply` gets it from whichever thread read it.
    """

    def __init__(
        self,
        *,
        load: Callable[[], Decided],
        apply: Callable[[Decided], None],
        max_age_s: float = 10.0,
        silence_s: float = 15.0,
    ) -> None:
        self._load = load
        self._apply = apply
        self._max_age_s = max_age_s
        self._silence_s = silence_s
        self._read_at = -max_age_s

    def refresh(self) -> None:
        """Read the policy. Blocks on the database; what cannot be read stays as it was."""
        self._read_at = time.monotonic()
        self._apply(self._load())

    def refresh_if_old(self) -> None:
        if time.monotonic() - self._read_at >= self._max_age_s:
            self.refresh()

    def _refresh_announced(self) -> None:
        try:
            self.refresh()
        except Exception as exc:  # whatever it is, the next announcement must be heard
            logger.warning("what operators have decided could not be read: %s", type(exc).__name__)

    async def listen(self, redis_url: str, channel: str) -> None:
        """Read the policy at once whenever another process announces a change, until cancelled."""
        while True:
            try:
                async with redis.asyncio.from_url(redis_url) as client, client.pubsub() as subscription:
                    await subscription.subscribe(channel)
                    is_asked = False
                    while True:
                        message = await subscription.get_message(timeout=self._silence_s)
                        if message is not None and message["type"] == "message":
                            await asyncio.to_thread(self._refresh_announced)
                        elif message is None and is_asked:
                            raise TimeoutError  # of a line that is dead nobody else says so
                        elif message is None:
                            await subscription.ping()
                        is_asked = message is None
            except (RedisError, OSError) as exc:
                logger.warning("changes of policy are not announced: %s", type(exc).__name__)
                await asyncio.sleep(_RECONNECT_SECONDS)
