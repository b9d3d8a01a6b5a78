"""Counts of limits in Redis: exact for all workers of all machines, one round trip a request, and never in the way.

Whatever takes longer than the line's deadline counts as no answer. After a few of those in a row a breaker opens:
nobody waits for Redis any more, until it takes what is written again.

A Redis that has lost its memory is noticed by its epoch, which each script looks at. Before anything else is asked of
it, it is told what this worker knows: what was spent by Redis's own last word, and what is in progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from gateway.limit_scripts import ADMIT, BEGIN, EXTEND, RENEW, RESTORE, SETTLE, Script
from gateway.limit_witness import Held, Witness, is_leased
from gateway.limits import Ask, Reason, Refusal
from gateway.redis_line import RedisAwayError, RedisLine

logger = logging.getLogger("gateway.limits")

LEASE_SECONDS = 60
_RENEW_SECONDS = 15.0
_FAILURES_TO_OPEN = 3
_PROBE_SECONDS = 1.0
_MOST_UNSENT = 10_000
# Of those in flight together: all of them take Redis, and this worker, longer than an answer may.
_MOST_AT_ONCE = 50
# How long a request waits until a Redis that has lost its memory has been told.
_RECOVERY_SECONDS = 1.0
_LOST = -1
_SCRIPTS = (ADMIT, EXTEND, SETTLE, RENEW, RESTORE, BEGIN)


class LimitsAwayError(Exception):
    """The counts cannot be reached now. `was_asked`: what was asked for may be counted all the same, later."""

    def __init__(self, *, was_asked: bool = False) -> None:
        super().__init__()
        self.was_asked = was_asked


class _Settlement(NamedTuple):
    """What a request has used, as it is told: the words of `SETTLE` but for the epoch."""

    asks: Sequence[Ask]
    month: str
    words: tuple[str | int, ...]


class RedisStore:
    """The same door as `gateway.limit_memory.MemoryStore`. `keep` holds connection and leases: run it as a task."""

    def __init__(self, url: str, *, prefix: str, deadline_s: float = 0.05) -> None:
        # Loaded beforehand: a settlement that nobody knows the script of would come behind what was asked after it.
        self._loading = [("SCRIPT", "LOAD", script.text) for script in _SCRIPTS]
        self._line = RedisLine(url, deadline_s=deadline_s, silence_s=max(1.0, deadline_s), first=self._loading)
        self._prefix = f"{prefix}:limits"
        self._epoch_key = f"{self._prefix}:epoch"
        self._failures = 0
        self._is_open = False
        self._numbers = itertools.count()
        self._nonce = secrets.token_hex(6)
        self._epoch = ""
        self._witness = Witness()
        self._recovery: asyncio.Task[bool] | None = None
        # What was used while nobody could be told.
        self._unsent: deque[_Settlement] = deque(maxlen=_MOST_UNSENT)

    @property
    def is_away(self) -> bool:
        """Whether the breaker is open, or there is no connection to a Redis that takes what is written."""
        return self._is_open or not self._line.is_open or not self._epoch

    async def admit(self, request_id: str, asks: Sequence[Ask], *, month: str, now: float) -> Refusal | None:
        """Take what a request asks for, all of it or nothing; a refusal says what is missing.

        `now` is not looked at: Redis's clock counts. Raises LimitsAwayError.
        """
        arguments: list[str | int] = [request_id, month, LEASE_SECONDS]
        for ask in asks:
            limits = ask.limits
            arguments += (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_streams)
            arguments += (limits.monthly_units, ask.tokens, ask.units, ask.spent_units)
        held = Held(asks, max((ask.units for ask in asks), default=0))
        try:
            answer = await self._run(ADMIT, asks, arguments)
        except asyncio.CancelledError:
            self.disown(request_id, asks, month=month)  # the client has left meanwhile
            raise
        if answer[0]:
            return _refusal(answer, asks)
        if any(is_leased(ask) for ask in asks):
            self._witness.held[request_id] = held
            self._witness.hear(asks, answer[1:], month=month)
        return None

    def disown(self, request_id: str, asks: Sequence[Ask], *, month: str) -> None:
        """Give back what Redis may have taken for a request of which nothing comes.

        But for tokens, which come back within the minute: to give back what was refused would fill the measure of
        whoever leaves at once.
        """
        untaken = [ask._replace(tokens=0) for ask in asks]
        self._send_later(self._settlement(request_id, untaken, tokens=0, units=0, month=month, is_end=True))

    async def extend(self, request_id: str, asks: Sequence[Ask], *, units: int, month: str, now: float) -> bool:
        """Reserve so much more for a request in progress; return whether it was there. Raises LimitsAwayError.

        Below 0 it is given back.
        """
        paid = [ask for ask in asks if ask.limits.monthly_units]
        # One that passed while Redis was away has reserved nothing yet.
        held = self._witness.held.setdefault(request_id, Held(asks, 0))
        async with held.turn:  # Redis is told a sum, to which two would otherwise add at once
            total = max(held.units + units, 0)
            arguments: list[str | int] = [request_id, month, total, LEASE_SECONDS]
            arguments += [ask.limits.monthly_units for ask in paid]
            (has_changed,) = await self._run(EXTEND, paid, arguments)
            is_there = bool(has_changed) or units < 0
            if is_there:
                held.units = total
        return is_there

    async def overdrawn(self, asks: Sequence[Ask], *, month: str, now: float) -> Refusal | None:
        """Return the first of these whose tokens of the minute are used up and more, as a refusal; None if none are.

        Redis has been told before of whatever was settled before. Raises LimitsAwayError.
        """
        arguments: list[str | int] = ["", month, LEASE_SECONDS]
        for ask in asks:
            arguments += (0, ask.limits.tokens_per_minute, 0, 0, 0, 0, 0)
        answer = await self._run(ADMIT, asks, arguments)
        return _refusal(answer, asks) if answer[0] else None

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
            self._witness.held.pop(request_id, None)
        if not any(is_leased(ask) or ask.limits.tokens_per_minute for ask in asks):
            return  # requests per minute are counted when they come
        self._send(self._settlement(request_id, asks, tokens=tokens, units=units, month=month, is_end=is_end))

    async def keep(self) -> None:
        """Hold the connection and the leases of requests in progress, and watch Redis, until cancelled."""
        line = asyncio.create_task(self._line.keep())
        try:
            renew_at = 0.0
            loop = asyncio.get_running_loop()
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._line.opened.wait(), _PROBE_SECONDS)
                is_new = self._line.opened.is_set()
                # Also of one that is lost again by now: what is set would not be waited for, not even once.
                self._line.opened.clear()
                if self._line.is_open and (is_new or self.is_away) and not await self._recover() and not is_new:
                    # Its address may lead to another one by now: what is a replica since a failover stays one.
                    self._line.drop()
                if self.is_away:
                    continue
                self._send_rest()
                if loop.time() >= renew_at:
                    with contextlib.suppress(RedisAwayError):  # then once more in the next turn
                        await self._renew()
                        renew_at = loop.time() + _RENEW_SECONDS
        finally:
            line.cancel()
            if self._recovery is not None:
                self._recovery.cancel()

    async def wait_until_open(self, timeout_s: float) -> None:
        """Wait until counts are there for the first time, but not longer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.is_away and loop.time() < deadline:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(0.01)

    # What is said

    def _keys(self, asks: Sequence[Ask]) -> list[str]:
        return [f"{self._prefix}:{ask.name}{part}" for ask in asks for part in ("", ":live", ":held")]

    def _settlement(
        self, request_id: str, asks: Sequence[Ask], *, tokens: int, units: int, month: str, is_end: bool
    ) -> _Settlement:
        keys = [f"{self._prefix}:done:{self._nonce}{next(self._numbers):x}", *self._keys(asks)]
        arguments: list[str | int] = [request_id, month, units, int(is_end)]
        for ask in asks:
            more = tokens - (ask.tokens if is_end else 0)
            arguments += (ask.limits.tokens_per_minute, more, int(bool(ask.limits.monthly_units)))
        return _Settlement(asks, month, (len(keys) + 1, *keys, self._epoch_key, *arguments))

    async def _run(self, script: Script, asks: Sequence[Ask], arguments: Sequence[str | int]) -> Any:
        """Return the answer of a script that looks at the epoch. Raises LimitsAwayError."""
        keys = [*self._keys(asks), self._epoch_key]
        for _ in range(2):
            if self._is_open:
                break
            try:
                answer = await self._call(script, keys, [*arguments, self._epoch])
            except RedisAwayError as exc:
                raise LimitsAwayError(was_asked=True) from exc
            if answer[0] != _LOST:
                self._failures = 0
                return answer
            if not await self._recovered():
                break
        raise LimitsAwayError

    async def _call(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        try:
            try:
                return await self._line.call("EVALSHA", script.sha, len(keys), *keys, *arguments)
            except RedisAwayError as exc:
                if str(exc) != "NOSCRIPT":
                    raise
                return await self._line.call("EVAL", script.text, len(keys), *keys, *arguments)
        except RedisAwayError as exc:
            self._note_failure(exc)
            raise

    def _send(self, settlement: _Settlement, *, is_text: bool = False) -> None:
        """Send a settlement, and keep it for later if nobody takes it: told twice, it counts once."""
        if self._is_open:
            self._send_later(settlement)
            return
        script = ("EVAL", SETTLE.text) if is_text else ("EVALSHA", SETTLE.sha)
        try:
            answer = self._line.call(*script, *settlement.words, self._epoch)
        except RedisAwayError as exc:
            self._note_failure(exc)
            self._send_later(settlement)
            return
        answer.add_done_callback(lambda done: self._look_at(done, settlement))

    def _look_at(self, answer: asyncio.Future[Any], settlement: _Settlement) -> None:
        if answer.cancelled():
            return
        exc = answer.exception()
        if exc is None:
            found = answer.result()
            if found[0] == _LOST:
                self._send_later(settlement)
                self._recover()
            else:
                self._witness.hear(settlement.asks, found[1:], month=settlement.month)
                if self._unsent:
                    self._send(self._unsent.popleft())
        elif str(exc) == "NOSCRIPT":
            self._send(settlement, is_text=True)
        else:
            self._note_failure(exc)
            self._send_later(settlement)

    def _send_rest(self) -> None:
        """Begin to tell what waits: each that is taken sends the next."""
        for _ in range(min(len(self._unsent), _MOST_AT_ONCE)):
            self._send(self._unsent.popleft())

    def _send_later(self, settlement: _Settlement) -> None:
        self._unsent.append(settlement)

    def _note_failure(self, exc: BaseException | None) -> None:
        self._failures += 1
        if self._failures >= _FAILURES_TO_OPEN and not self._is_open:
            self._is_open = True
            logger.error("limits are not counted: Redis does not take them (%s)", exc)

    # A Redis that is new, or has lost its memory, or took nothing for a while

    async def _recovered(self) -> bool:
        done, _ = await asyncio.wait({self._recover()}, timeout=_RECOVERY_SECONDS)
        return bool(done) and done.pop().result()

    def _recover(self) -> asyncio.Task[bool]:
        """Return what becomes True when Redis knows what this worker knows; of several callers all get the same."""
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.create_task(self._tell_all())
        return self._recovery

    async def _tell_all(self) -> bool:
        try:
            # First: a memory that is lost again meanwhile has another epoch.
            answer = await self._call(BEGIN, [self._epoch_key, f"{self._prefix}:probe"], [secrets.token_hex(8)])
            epoch = answer.decode()
            is_lost = self._epoch not in ("", epoch)
            if is_lost:  # and perhaps the scripts with it
                for command in self._loading:
                    await self._line.call(*command)
            for part in self._witness.spent():
                keys = [f"{self._prefix}:{name}{end}" for name, _, _ in part for end in ("", ":live")]
                await self._call(RESTORE, keys, [word for _, month, units in part for word in (month, units)])
            await self._renew()
        except RedisAwayError:
            return False
        if self._is_open:
            logger.warning("limits are counted again")
        if is_lost:
            logger.warning("Redis had lost what limits have counted; it was told what this worker knows")
        self._epoch = epoch
        self._is_open = False
        self._failures = 0
        self._send_rest()
        return True

    async def _renew(self) -> None:
        """Begin anew the leases of what is in progress. Raises RedisAwayError."""
        for ask, requests in self._witness.leases():
            words = [word for request in requests for word in request]
            await self._call(RENEW, self._keys([ask]), [LEASE_SECONDS, *words])


def _refusal(answer: Any, asks: Sequence[Ask]) -> Refusal:
    place, reason, limit, remaining, wait_ms, reset_ms = answer
    wait_s = None if wait_ms < 0 else wait_ms / 1000
    return Refusal(asks[place - 1].scope, cast(Reason, reason.decode()), limit, remaining, wait_s, reset_ms / 1000)
