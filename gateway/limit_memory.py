"""Counts of limits in this process's memory: exact, as long as it is the only one."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gateway.limits import Ask, Refusal, take

_SWEEP_AT = 10_000


@dataclass(slots=True)
class _State:
    """Of one key or address; see `gateway.limits.take` for the two times."""

    requests_full_at: float = 0.0
    tokens_full_at: float = 0.0
    open_requests: int = 0
    month: str = ""
    spent_units: int = 0
    reserved_units: int = 0


class MemoryStore:
    """The door to the counts of one process. Times are seconds of a clock that nobody sets; nothing waits.

    What was spent never becomes less within a month: a request that the ledger does not know yet must not be forgotten.
    """

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}
        self._sweep_at = _SWEEP_AT
        self._lock = threading.Lock()

    async def admit(self, request_id: str, asks: Sequence[Ask], *, month: str, now: float) -> Refusal | None:
        """Take what a request asks for, all of it or nothing; a refusal says what is missing."""
        with self._lock:
            states = [self._state(ask, month, now) for ask in asks]
            for state, ask in zip(states, asks, strict=True):
                if (refusal := _refusal(state, ask, now)) is not None:
                    return refusal
            for state, ask in zip(states, asks, strict=True):
                _take(state, ask, now)
        return None

    async def extend(self, request_id: str, asks: Sequence[Ask], *, units: int, month: str, now: float) -> bool:
        """Reserve so much more for a request in progress; return whether it was there. Below 0 it is given back."""
        with self._lock:
            found = [(self._state(ask, month, now), ask) for ask in asks if ask.limits.monthly_units]
            if units >= 0 and any(
                state.spent_units + state.reserved_units + units > ask.limits.monthly_units for state, ask in found
            ):
                return False
            for state, _ in found:
                state.reserved_units = max(state.reserved_units + units, 0)
        return True

    async def overdrawn(self, asks: Sequence[Ask], *, month: str, now: float) -> Refusal | None:
        """Return the first of these whose tokens of the minute are used up and more, as a refusal; None if none are."""
        with self._lock:
            found = (_refusal(self._state(ask, month, now), ask.for_tokens(), now) for ask in asks)
            return next((refusal for refusal in found if refusal is not None), None)

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
        """Count what a request has used since the last time; at its end, what it had reserved is free again."""
        with self._lock:
            for ask in asks:
                state = self._state(ask, month, now)
                if is_end:
                    state.open_requests = max(state.open_requests - 1, 0)
                if ask.limits.monthly_units:
                    state.reserved_units = max(state.reserved_units - reserved, 0)
                    if state.month == month:
                        state.spent_units += units
                if limit := ask.limits.tokens_per_minute:
                    more = tokens - (ask.tokens if is_end else 0)
                    from_s = max(state.tokens_full_at, now) if more > 0 else state.tokens_full_at
                    state.tokens_full_at = take(from_s, 0.0, limit=limit, amount=more).full_at

    def _state(self, ask: Ask, month: str, now: float) -> _State:
        state = self._states.get(ask.name)
        if state is None:
            if len(self._states) >= self._sweep_at:
                self._sweep(now)
            state = self._states[ask.name] = _State()
        if state.month < month:
            state.month = month
            state.spent_units = 0
        if state.spent_units < ask.spent_units and state.month == month:
            state.spent_units = ask.spent_units
        return state

    def _sweep(self, now: float) -> None:
        """Forget whoever is as if he had never come: names are made up by clients."""
        self._states = {
            name: state
            for name, state in self._states.items()
            if state.open_requests
            or state.reserved_units
            or state.spent_units
            or max(state.requests_full_at, state.tokens_full_at) > now
        }
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._states))

    # From another thread

    def names(self) -> list[str]:
        """Return whom this process has counted lately."""
        with self._lock:
            return list(self._states)

    def spent_by(self, names: Iterable[str], *, month: str) -> dict[str, int]:
        """Return what these have spent in a month, for whoever keeps it beyond this process's life."""
        with self._lock:
            found = ((name, self._states.get(name)) for name in names)
            return {
                name: state.spent_units for name, state in found if state and state.month == month and state.spent_units
            }

    def restore(self, spent_units: Mapping[str, int], *, month: str) -> None:
        """Begin with what was kept of another process."""
        with self._lock:
            for name, units in spent_units.items():
                self._states[name] = _State(month=month, spent_units=units)


def _refusal(state: _State, ask: Ask, now: float) -> Refusal | None:
    limits = ask.limits
    if limits.concurrent_streams and state.open_requests >= limits.concurrent_streams:
        return Refusal(ask.scope, "streams", limits.concurrent_streams, 0, 1.0)
    if limit := limits.requests_per_minute:
        bucket = take(state.requests_full_at, now, limit=limit, amount=1)
        if bucket.wait_s:
            reset_s = max(state.requests_full_at - now, 0.0)
            return Refusal(ask.scope, "requests", limit, bucket.remaining, bucket.wait_s, reset_s)
    if limit := limits.tokens_per_minute:
        bucket = take(state.tokens_full_at, now, limit=limit, amount=ask.tokens)
        if bucket.wait_s:
            wait_s = bucket.wait_s if ask.tokens <= limit else None
            reset_s = max(state.tokens_full_at - now, 0.0)
            return Refusal(ask.scope, "tokens", limit, bucket.remaining, wait_s, reset_s)
    if limits.monthly_units and ask.units:
        left = limits.monthly_units - state.spent_units
        if ask.units + state.reserved_units > left:
            return Refusal(ask.scope, "spend", limits.monthly_units, max(left, 0), 1.0 if ask.units <= left else None)
    return None


def _take(state: _State, ask: Ask, now: float) -> None:
    limits = ask.limits
    state.open_requests += 1
    if limits.requests_per_minute:
        state.requests_full_at = take(state.requests_full_at, now, limit=limits.requests_per_minute, amount=1).full_at
    if limits.tokens_per_minute:
        amount = ask.tokens
        state.tokens_full_at = take(state.tokens_full_at, now, limit=limits.tokens_per_minute, amount=amount).full_at
    if limits.monthly_units:
        state.reserved_units += ask.units
