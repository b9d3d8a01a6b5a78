"""Counts of limits in Redis: exact for all workers of all machines, one round trip a request, and never in the way.

Whatever takes longer than the line's deadline counts as no answer. After a few of those in a row a breaker opens:
nobody waits for Redis any more, until it answers again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from gateway.limit_scripts import ADMIT, EXTEND, RENEW, SETTLE, Script
from gateway.limits import Ask, Reason, Refusal
from gateway.redis_line import RedisAwayError, RedisLine

logger = logging.getLogger("gateway.limits")

LEASE_SECONDS = 60
_RENEW_SECONDS = 15.0
_FAILURES_TO_OPEN = 3
_PROBE_SECONDS = 1.0
_MOST_UNSENT = 10_000
_RENEWED_AT_ONCE = 200

Command = tuple[str | int, ...]


class LimitsAwayError(Exception):
    """The counts cannot be reached now."""


@dataclass(slots=True)
class _Held:
    asks: Sequence[Ask]
    units: int


class RedisStore:
    """The same door as `gateway.limit_memory.MemoryStore`. `keep` holds connection and leases: run it as a task."""

    def __init__(self, url: str, *, prefix: str, deadline_s: float = 0.05) -> None:
        # Loaded beforehand: a settlement that nobody knows the script of would come behind what was asked after it.
        scripts = [("SCRIPT", "LOAD", script.text) for script in (ADMIT, EXTEND, SETTLE, RENEW)]
        self._line = RedisLine(url, deadline_s=deadline_s, first=scripts)
        self._prefix = f"{prefix}:limits"
        self._failures = 0
        self._is_open = False
        self._numbers = itertools.count()
        self._nonce = secrets.token_hex(6)
        self._held: dict[str, _Held] = {}
        # What was used while nobody could be told.
        self._unsent: deque[Command] = deque(maxlen=_MOST_UNSENT)

    @property
    def is_away(self) -> bool:
        """Whether the breaker is open, or there is no connection."""
        return self._is_open or not self._line.is_open

    async def admit(self, request_id: str, asks: Sequence[Ask], *, month: str, now: float) -> Refusal | None:
        """Take what a request asks for, all of it or nothing; a refusal says what is missing.

        `now` is not looked at: Redis's clock counts. Raises LimitsAwayError.
        """
        arguments: list[str | int] = [request_id, month, LEASE_SECONDS]
        for ask in asks:
            limits = ask.limits
            arguments += (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_streams)
            arguments += (limits.monthly_units, ask.tokens, ask.units, ask.spent_units)
        held = _Held(asks, max((ask.units for ask in asks), default=0))
        try:
            answer = await self._run(ADMIT, self._keys(asks), arguments)
        except asyncio.CancelledError:
            # The client has left meanwhile; it may have been counted all the same.
            self._send_later(self._settlement(request_id, asks, tokens=0, units=0, month=month, is_end=True))
            raise
        if answer[0]:
            place, reason, limit, remaining, wait_ms, reset_ms = answer
            wait_s = None if wait_ms < 0 else wait_ms / 1000
            told = cast(Reason, reason.decode())
            return Refusal(asks[place - 1].scope, told, limit, remaining, wait_s, reset_ms / 1000)
        if any(_is_leased(ask) for ask in asks):
            self._held[request_id] = held
        return None

    async def extend(self, request_id: str, asks: Sequence[Ask], *, units: int, month: str, now: float) -> bool:
        """Reserve so much more for a request in progress; return whether it was there. Raises LimitsAwayError.

        Below 0 it is given back.
        """
        paid = [ask for ask in asks if ask.limits.monthly_units]
        # One that passed while Redis was away has reserved nothing yet.
        held = self._held.get(request_id) or _Held(asks, 0)
        total = max(held.units + units, 0)
        arguments: list[str | int] = [request_id, month, total, LEASE_SECONDS]
        arguments += [ask.limits.monthly_units for ask in paid]
        is_there = bool(await self._run(EXTEND, self._keys(paid), arguments)) or units < 0
        if is_there:
            held.units = total
            self._held[request_id] = held
        return is_there

    def settle(
        self,
        request_id: str,
        asks: Sequence[Ask],
        *,
        tokens: int,
        units: int,
        reserved: int,
        month: str,
        now: float,
        is_end: bool = True,
    ) -> None:
        """Count what a request has used since the last time; at its end, what it had reserved is free again.

        Waits for nothing; while Redis is away, it is told later.
        """
        if is_end:
            self._held.pop(request_id, None)
        if not any(_is_leased(ask) or ask.limits.tokens_per_minute for ask in asks):
            return  # requests per minute are counted when they come
        self._send(self._settlement(request_id, asks, tokens=tokens, units=units, month=month, is_end=is_end))

    async def keep(self) -> None:
        """Hold the connection and the leases of requests in progress, and watch Redis, until cancelled."""
        line = asyncio.create_task(self._line.keep())
        try:
            renew_at = 0.0
            loop = asyncio.get_running_loop()
            while True:
                await asyncio.sleep(_PROBE_SECONDS)
                if self.is_away:
                    await self._probe()
                if self.is_away:
                    continue
                while self._unsent and not self.is_away:
                    self._send(self._unsent.popleft())
                if loop.time() >= renew_at:
                    renew_at = loop.time() + _RENEW_SECONDS
                    await self._renew()
        finally:
            line.cancel()

    async def wait_until_open(self, timeout_s: float) -> None:
        """Wait for the first connection, but not longer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self._line.is_open and loop.time() < deadline:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(0.01)

    # What is said

    def _keys(self, asks: Sequence[Ask]) -> list[str]:
        return [f"{self._prefix}:{ask.name}{part}" for ask in asks for part in ("", ":live", ":held")]

    def _settlement(
        self, request_id: str, asks: Sequence[Ask], *, tokens: int, units: int, month: str, is_end: bool
    ) -> Command:
        keys = [f"{self._prefix}:done:{self._nonce}{next(self._numbers):x}", *self._keys(asks)]
        arguments: list[str | int] = [request_id, month, units, int(is_end)]
        for ask in asks:
            more = tokens - (ask.tokens if is_end else 0)
            arguments += (ask.limits.tokens_per_minute, more, int(bool(ask.limits.monthly_units)))
        return (SETTLE.sha, len(keys), *keys, *arguments)

    async def _run(self, script: Script, keys: list[str], arguments: Sequence[str | int]) -> Any:
        if self._is_open:
            raise LimitsAwayError
        try:
            try:
                answer = await self._line.call("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except RedisAwayError as exc:
                if str(exc) != "NOSCRIPT":
                    raise
                answer = await self._line.call("EVAL", script.text, len(keys), *keys, *arguments)
        except RedisAwayError as exc:
            self._note_failure(exc)
            raise LimitsAwayError from exc
        self._failures = 0
        return answer

    def _send(self, command: Command) -> None:
        """Send a settlement, and keep it for later if nobody takes it: told twice, it counts once."""
        if self._is_open:
            self._send_later(command)
            return
        try:
            answer = self._line.call("EVALSHA", *command)
        except RedisAwayError as exc:
            self._note_failure(exc)
            self._send_later(command)
            return
        answer.add_done_callback(lambda done: self._look_at(done, command))

    def _look_at(self, answer: asyncio.Future[Any], command: Command) -> None:
        if answer.cancelled() or answer.exception() is None:
            return
        exc = answer.exception()
        if str(exc) == "NOSCRIPT":
            self._send_text(command)
            return
        self._note_failure(exc)
        self._send_later(command)

    def _send_text(self, command: Command) -> None:
        try:
            answer = self._line.call("EVAL", SETTLE.text, *command[1:])
        except RedisAwayError:
            self._send_later(command)
            return
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _send_later(self, command: Command) -> None:
        self._unsent.append(command)

    def _note_failure(self, exc: BaseException | None) -> None:
        self._failures += 1
        if self._failures >= _FAILURES_TO_OPEN and not self._is_open:
            self._is_open = True
            logger.error("limits are not counted: Redis does not answer (%s)", exc)

    async def _probe(self) -> None:
        try:
            await self._line.call("PING")
        except RedisAwayError:
            return
        if self._is_open:
            logger.warning("limits are counted again")
        self._is_open = False
        self._failures = 0

    async def _renew(self) -> None:
        """Begin anew the leases of what is in progress, a few at a time."""
        by_ask: defaultdict[str, list[tuple[Ask, str, int]]] = defaultdict(list)
        for request_id, held in self._held.items():
            for ask in held.asks:
                if _is_leased(ask):
                    units = held.units if ask.limits.monthly_units else 0
                    by_ask[ask.name].append((ask, request_id, units))
        for found in by_ask.values():
            for start in range(0, len(found), _RENEWED_AT_ONCE):
                # What has ended meanwhile must not come back.
                part = [entry for entry in found[start : start + _RENEWED_AT_ONCE] if entry[1] in self._held]
                if not part:
                    continue
                arguments: list[str | int] = [LEASE_SECONDS]
                for _, request_id, units in part:
                    arguments += (request_id, units)
                try:
                    await self._run(RENEW, self._keys([part[0][0]]), arguments)
                except LimitsAwayError:
                    return


def _is_leased(ask: Ask) -> bool:
    return bool(ask.limits.concurrent_streams or ask.limits.monthly_units)
