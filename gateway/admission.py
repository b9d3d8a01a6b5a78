"""What operators have decided, brought to a worker: now and then, and at once where it is announced."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import redis.asyncio
from redis.exceptions import RedisError

logger = logging.getLogger("gateway.admission")

_RECONNECT_SECONDS = 5.0


Decided = TypeVar("Decided")


class Policy(Generic[Decided]):
    """What operators have decided, as each worker knows it: read now and then, never for a request.

    A thread of its own reads it, so that nothing else that waits for the database makes it late. `load` yields what is
    known so far, one after the other; `apply` gets each of them in that thread.
    """

    def __init__(
        self,
        *,
        load: Callable[[], Iterable[Decided]],
        apply: Callable[[Decided], None],
        max_age_s: float = 10.0,
        silence_s: float = 15.0,
    ) -> None:
        self._load = load
        self._apply = apply
        self._max_age_s = max_age_s
        self._silence_s = silence_s
        self._is_wanted = threading.Event()
        self._is_stopping = False
        # A daemon: a database that does not answer must not keep the process.
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def refresh(self) -> None:
        """Have it read soon, and once more if it is being read right now."""
        self._is_wanted.set()

    def close(self) -> None:
        """Read no more; does not wait for what is being read."""
        self._is_stopping = True
        self._is_wanted.set()

    def _run(self) -> None:
        while not self._is_stopping:
            self._is_wanted.clear()
            try:
                for decided in self._load():
                    self._apply(decided)
            except Exception as exc:  # whatever it is, what is known holds on, and the next look may succeed
                logger.warning("what operators have decided could not be read: %s", type(exc).__name__)
            self._is_wanted.wait(self._max_age_s)

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
                            self.refresh()
                        elif message is None and is_asked:
                            raise TimeoutError  # of a line that is dead nobody else says so
                        elif message is None:
                            await subscription.ping()
                        is_asked = message is None
            except (RedisError, OSError) as exc:
                logger.warning("changes of policy are not announced: %s", type(exc).__name__)
                await asyncio.sleep(_RECONNECT_SECONDS)
