"""A store of what limits count, in memory or in Redis, as tests use it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from gateway.limit_memory import MemoryStore
from gateway.limit_redis import RedisStore
from gateway.limits import Ask, Limits, Refusal

MONTH = "2026-11"


@dataclass
class Store:
    """A store, and names that nobody else uses."""

    store: MemoryStore | RedisStore
    nonce: str
    number: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """How much may have come back since the beginning."""
        return time.monotonic() - self.began_s

    def ask(self, limits: Limits, *, name: str = "k:a", tokens: int = 0, units: int = 0, spent: int = 0) -> Ask:
        return Ask("key", f"{name}:{self.nonce}", limits, tokens, units, spent)

    async def admit(self, *asks: Ask, month: str = MONTH) -> Refusal | None:
        self.number += 1
        return await self.store.admit(f"r{self.number}", asks, month=month, now=time.time())

    def settle(
        self, number: int, *asks: Ask, tokens: int = 0, units: int = 0, reserved: int = 0, is_end: bool = True
    ) -> None:
        now = time.time()
        self.store.settle(
            f"r{number}", asks, tokens=tokens, units=units, reserved=reserved, month=MONTH, now=now, is_end=is_end
        )

    async def overdrawn(self, *asks: Ask) -> Refusal | None:
        return await self.store.overdrawn(asks, month=MONTH, now=time.time())

    async def extend(self, number: int, *asks: Ask, units: int) -> bool:
        return await self.store.extend(f"r{number}", asks, units=units, month=MONTH, now=time.time())
