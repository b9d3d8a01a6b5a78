"""What one request has taken of its limits, until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, TypeVar

from billing.events import Usage, UsageEvent
from gateway.demand import Demand
from gateway.errors import GatewayError, LimitsUnavailableError, SpendLimitedError
from gateway.limit_errors import error_of
from gateway.limit_redis import LimitsAwayError
from gateway.limits import Ask
from gateway.written import tokens_in_events

if TYPE_CHECKING:
    from gateway.limiter import Limiter

logger = logging.getLogger("gateway.limits")
_Answer = TypeVar("_Answer")

# A stream that has used up its reservation asks for this part of it again.
_EXTENSION_PART = 4
# An upstream that sends this much at once may fill the transport's buffers meanwhile, whose content is the next piece:
# what waits (`gateway.answer.WAITING_BYTES`) and one more read.
_BURST_BYTES, _MOST_READ_BYTES = 4 << 10, 320 << 10
# A store that is away is asked again for as long as its breaker takes to see that it is back.
_PATIENCE_S, _RETRY_S = 5.0, 0.25
_LEAST_GRACE_TOKENS = 64


class Hold:
    """What one request has taken; given back, or turned into what was used, when it ends.

    `watches`: the events of its stream are looked at, since its money may end before it does.
    """

    __slots__ = (
        "_asks",
        "_factor",
        "_grace_tokens",
        "_is_settled",
        "_largest_tokens",
        "_limiter",
        "_model",
        "_month",
        "_reserved_units",
        "_seen_tokens",
        "_service_tier",
        "_tokens_paid",
        "cut_for",
        "request_id",
        "watches",
    )

    def __init__(
        self,
        limiter: Limiter,
        request_id: str,
        asks: Sequence[Ask],
        *,
        month: str,
        factor: Decimal,
        units: int,
        demand: Demand,
        model: str,
        service_tier: str,
        watches: bool,
    ) -> None:
        self.request_id = request_id
        self.watches = watches
        self.cut_for: GatewayError = SpendLimitedError("This API key's spend limit is reached; the session ends here.")
        self._limiter = limiter
        self._asks = asks
        self._month = month
        self._model = model
        self._service_tier = service_tier
        self._factor = factor
        self._reserved_units = units
        self._tokens_paid = demand.output_tokens
        self._grace_tokens = grace_tokens(demand)
        self._seen_tokens = self._largest_tokens = 0
        self._is_settled = False

    def needs_more(self, events: bytes) -> bool:
        """Look at events of the stream; return whether as many as ever came at once may be more than is reserved."""
        tokens = tokens_in_events(events)
        self._seen_tokens += tokens
        if len(events) > _BURST_BYTES:
            tokens = max(tokens, tokens * _MOST_READ_BYTES // len(events) + 1)
        self._largest_tokens = max(self._largest_tokens, tokens)
        if self._grace_tokens:
            return self._seen_tokens > self._tokens_paid + self._grace_tokens
        return self._seen_tokens + self._largest_tokens > self._tokens_paid

    async def extend(self) -> None:
        """Reserve for what was written, the next piece, and some more.

        Raises SpendLimitedError if it is not there; LimitsUnavailableError if nobody can tell, and that must not be.
        """
        limiter = self._limiter
        self._grace_tokens = 0
        missing = self._seen_tokens + self._largest_tokens - self._tokens_paid
        tokens = missing + max(limiter.options.output_tokens // _EXTENSION_PART, 1)
        if not await self._reserve(tokens):
            # Less will do, as long as it is enough for the next piece.
            tokens = missing
            if not await self._reserve(tokens):
                self.watches = False
                limiter.tally.refused("key", "cut")
                raise SpendLimitedError("This API key's spend limit is reached; the answer ends here.")
        self._tokens_paid += tokens

    async def _reserve(self, tokens: int) -> bool:
        usage = Usage(output_tokens=tokens)
        tier = self._service_tier
        units = self._limiter.prices.most(self._model, usage, service_tier=tier, factor=self._factor) or 0
        return await self.reserve_units(units)

    @property
    def has_money(self) -> bool:
        """Return whether there is a limit of money that this is held to."""
        return any(ask.limits.monthly_units for ask in self._asks)

    async def release_units(self, units: int) -> None:
        """Give back so much of what is reserved; nobody waits for a store that is away."""
        units = min(units, self._reserved_units)
        with contextlib.suppress(LimitsAwayError):
            await self._limiter.store.extend(
                self.request_id, self._asks, units=-units, month=self._month, now=time.monotonic()
            )
            self._reserved_units -= units

    async def reserve_units(self, units: int) -> bool:
        """Reserve so much more; return whether it was there.

        Raises LimitsUnavailableError if nobody can tell, and that must not be.
        """
        is_there = await self._extended(self._asks, units)
        if is_there:
            self._reserved_units += units
        return is_there is not False

    async def _extended(self, asks: Sequence[Ask], units: int) -> bool | None:
        """Return whether so much more was there; None where nobody can tell and that does not matter.

        Raises LimitsUnavailableError where it does.
        """
        store, request_id, month = self._limiter.store, self.request_id, self._month
        return await self._asked(lambda now: store.extend(request_id, asks, units=units, month=month, now=now))

    async def _asked(self, ask: Callable[[float], Awaitable[_Answer]]) -> _Answer | None:
        """Return what the store says; None where nobody can tell and that does not matter.

        Raises LimitsUnavailableError where it does.
        """
        limiter = self._limiter
        give_up_at = time.monotonic() + _PATIENCE_S
        while True:
            now = time.monotonic()
            try:
                return await ask(now)
            except LimitsAwayError:
                if not limiter.options.refuses_when_away:
                    return None
                if now >= give_up_at:
                    self.watches = False
                    limiter.tally.refused("key", "limits_away")
                    raise LimitsUnavailableError("Limits cannot be checked now; the answer ends here.") from None
            await asyncio.sleep(_RETRY_S)

    def settle(self, event: UsageEvent) -> None:
        """Count what the request has used, once; never raises."""
        if self._is_settled:
            return
        self._is_settled = True
        self._settle(event, is_end=True)

    def settle_part(self, event: UsageEvent) -> None:
        """Count what a session has used since the last time."""
        self._settle(event, is_end=False)

    def _settle(self, event: UsageEvent, *, is_end: bool) -> None:
        usage = event.usage
        try:
            units = self._units_of(event, is_end=is_end)
        except Exception:  # a price that cannot be reckoned must not cost the client its answer
            logger.exception("a request could not be priced")
            units = self._reserved_units
        self._limiter.store.settle(
            self.request_id,
            self._asks,
            tokens=_tokens_of(usage),
            units=units,
            reserved=self._reserved_units if is_end else 0,
            month=self._month,
            now=time.monotonic(),
            is_end=is_end,
        )

    def _units_of(self, event: UsageEvent, *, is_end: bool) -> int:
        if not any(ask.limits.monthly_units for ask in self._asks):
            return 0
        cost = self._limiter.prices.cost(event, factor=self._factor)
        was_taken = 200 <= event.status < 300 and event.outcome != "refused"
        is_open_session = event.status == 101 and cost is None
        if is_end and (is_open_session or (was_taken and (cost is None or event.usage_source == "none"))):
            # What nobody tells, or only later (a response in the background), was at most what is reserved.
            return self._reserved_units
        return cost or 0

    async def may_go_on(self) -> bool:
        """Return whether a session has tokens and money left, behind `settle_part`; if not, `cut_for` says why not."""
        try:
            return await self._has_tokens() and await self._has_money_left()
        except LimitsUnavailableError as error:
            self.cut_for = error
            return False

    async def _has_tokens(self) -> bool:
        store, month = self._limiter.store, self._month
        asks = [ask for ask in self._asks if ask.limits.tokens_per_minute]
        refusal = await self._asked(lambda now: store.overdrawn(asks, month=month, now=now)) if asks else None
        if refusal is None:
            return True
        self._limiter.tally.refused(refusal.scope, refusal.reason)
        self.cut_for = error_of(refusal, time.time())
        return False

    async def _has_money_left(self) -> bool:
        paid = [ask for ask in self._asks if ask.limits.monthly_units]
        return not (paid and self._limiter.options.cuts) or await self._extended(paid, 0) is not False


def grace_tokens(demand: Demand) -> int:
    """Return how many more tokens than its bound an answer that has one may seem to have.

    All of the bound is reserved, and the upstream ends the answer there: it must not be cut for being counted with too
    large a measure. One that goes on beyond this has an upstream that does not keep to the bound.
    """
    return demand.output_tokens + _LEAST_GRACE_TOKENS if demand.is_stated else 0


def _tokens_of(usage: Usage) -> int:
    return (
        usage.input_tokens
        + usage.cached_input_tokens
        + usage.cache_write_tokens
        + usage.output_tokens
        + usage.audio_input_tokens
        + usage.cached_audio_input_tokens
        + usage.audio_output_tokens
        + usage.image_input_tokens
        + usage.cached_image_input_tokens
        + usage.image_output_tokens
    )
