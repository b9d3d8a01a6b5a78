"""What a request may cost at most, before anybody knows what it uses; and what it did cost, by the ledger's rules."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

import msgspec

from billing.events import Usage, UsageEvent
from billing.fields import UNITS_PER_USD
from billing.pricing import TOKEN_PRICES, Price, cost_of
from billing.rating import Rater

_REFRESH_SECONDS = 60.0
_INPUTS = tuple(name for name in TOKEN_PRICES if not name.endswith("output") and not name.startswith("cached"))
_OUTPUTS = tuple(name for name in TOKEN_PRICES if name.endswith("output"))
_ONE = Decimal(1)


class Prices:
    """A worker's prices, read by `refresh` now and then, on a thread that may wait for the database."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rater: Rater | None = None
        self._clock = clock
        self._read_at = -_REFRESH_SECONDS

    def refresh_if_old(self) -> None:
        """Read the operator's own prices again; raises while the database is away, and keeps what it had."""
        if self._clock() - self._read_at >= _REFRESH_SECONDS:
            self._rater = Rater()
            self._read_at = self._clock()

    def most(self, model: str, usage: Usage, *, service_tier: str = "", factor: Decimal = _ONE) -> int | None:
        """Return the most that such a use may cost, in tenths of a micro-dollar; None if nobody knows.

        Tokens count as whatever kind of them costs most with this model: which of them it is shows only later.
        """
        if self._rater is None:
            return None
        price = self._rater.price_at(model, dt.datetime.now(dt.UTC))
        if price is None:
            return None
        found = cost_of(_dearest(usage, price), price, service_tier=service_tier, factor=factor).amount_usd
        return None if found is None else int((found * UNITS_PER_USD).to_integral_value(ROUND_CEILING))

    def cost(self, event: UsageEvent, *, factor: Decimal = _ONE) -> int | None:
        """Return what the ledger will say that this cost; None if it has no price."""
        if self._rater is None:
            return None
        at = dt.datetime.fromtimestamp(event.started_at, dt.UTC)
        return self._rater.rate(event, usage=event.usage, at=at, factor=factor).cost_units


def _dearest(usage: Usage, price: Price) -> Usage:
    """Return the usage with its tokens in the buckets that cost most; none where the model has no price for tokens."""
    read = usage.input_tokens + usage.audio_input_tokens
    written = usage.output_tokens + usage.audio_output_tokens + usage.image_output_tokens
    into, out_of = _dearest_buckets(price)
    buckets = {into: read if into else 0, out_of: written if out_of else 0}
    buckets.pop("", None)
    only_units = msgspec.structs.replace(
        usage, input_tokens=0, audio_input_tokens=0, output_tokens=0, audio_output_tokens=0, image_output_tokens=0
    )
    return msgspec.structs.replace(only_units, **buckets)


@lru_cache(maxsize=1024)
def _dearest_buckets(price: Price) -> tuple[str, str]:
    """Return the names of the buckets of `Usage` that cost most to fill, in and out; "" where none has a price."""
    return _dearest_of(price, _INPUTS), _dearest_of(price, _OUTPUTS)


def _dearest_of(price: Price, names: tuple[str, ...]) -> str:
    found = max(((getattr(price, name), name) for name in names if getattr(price, name) is not None), default=None)
    return "" if found is None else f"{found[1]}_tokens"
