"""What keys and addresses may do: limits, how they are counted, and what is said of a request beyond them. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, NamedTuple

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Scope = Literal["key", "address"]
Reason = Literal["requests", "tokens", "streams", "spend"]

WINDOW_S = 60.0
# What floats lose when a minute is divided and added up again.
_TOLERANCE_S = 1e-5
_IPV6_NETWORK_BITS = 64
_ONE = Decimal(1)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key, or one address, may do; 0 and () are no limit.

    Money is in tenths of a micro-dollar for each calendar month (UTC). A model is a name, or a prefix ending in `*`.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_streams: int = 0
    monthly_units: int = 0
    models: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether anything must be counted, which is what several workers can only do together."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrent_streams or self.monthly_units)

    @property
    def limits_anything(self) -> bool:
        return self.counts or bool(self.models or self.networks)

    def allows_model(self, model: str) -> bool:
        """Return whether a model may be asked for; its dated snapshots are models of their own."""
        if not self.models:
            return True
        wanted = model.lower()
        return any(
            wanted.startswith(name[:-1]) if name.endswith("*") else wanted == name
            for name in map(str.lower, self.models)
        )

    def allows_address(self, address: Address | None) -> bool:
        """Return whether requests may come from there; an address that nobody knows is in no network."""
        if not self.networks:
            return True
        return address is not None and any(address in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class Rules:
    """All that operators have decided, as one worker knows it; replaced as a whole, never changed.

    `overrides` and `factors` hold only the keys that have some. `registered` is None where any key passes.
    `spent_units` is what the ledger says of `month`, by fingerprint; whoever is not in it has spent nothing.
    `is_read` is False while nobody knows which keys are registered.
    """

    key: Limits = Limits()
    address: Limits = Limits()
    overrides: Mapping[str, Limits] = field(default_factory=dict)
    factors: Mapping[str, Decimal] = field(default_factory=dict)
    registered: frozenset[str] | None = None
    spent_units: Mapping[str, int] = field(default_factory=dict)
    month: str = ""
    is_read: bool = True

    def of_key(self, fingerprint: str) -> Limits:
        return self.overrides.get(fingerprint, self.key)

    def factor_of(self, fingerprint: str) -> Decimal:
        return self.factors.get(fingerprint, _ONE)

    def spent_by(self, fingerprint: str, month: str) -> int:
        return self.spent_units.get(fingerprint, 0) if month == self.month else 0

    @property
    def limits_anything(self) -> bool:
        """Whether any request must be looked at; if not, none is."""
        return (
            self.registered is not None
            or self.key.limits_anything
            or self.address.limits_anything
            or any(limits.limits_anything for limits in self.overrides.values())
        )


class Ask(NamedTuple):
    """What one request wants of one key or address, `name`: `tokens` of the minute's, `units` of the month's.

    `spent_units` is what the ledger says was spent already: less than that is never believed.
    """

    scope: Scope
    name: str
    limits: Limits
    tokens: int = 0
    units: int = 0
    spent_units: int = 0

    def for_tokens(self) -> Ask:
        """Return what asks for nothing, and is refused while more than a minute's tokens are used."""
        return Ask(self.scope, self.name, Limits(tokens_per_minute=self.limits.tokens_per_minute))


class Refusal(NamedTuple):
    """Which limit a request has met. `retry_s` None: waiting does not help, or only until the next month."""

    scope: Scope
    reason: Reason
    limit: int
    remaining: int
    retry_s: float | None
    reset_s: float = 0.0


class Bucket(NamedTuple):
    """What `take` found: `full_at` is when the whole minute's worth will be there again, if this is taken."""

    full_at: float
    wait_s: float
    remaining: int


def take(full_at: float, now: float, *, limit: int, amount: float) -> Bucket:
    """Take an amount of what comes back evenly, `limit` each minute, and at most so much at once.

    `wait_s` is 0 where it is there. The generic cell rate algorithm: one number holds the state, the time at which
    all will be there again. All times are in seconds of one clock.
    """
    each_s = WINDOW_S / limit
    then = max(full_at, now) + amount * each_s
    wait_s = then - now - WINDOW_S
    left_s = WINDOW_S - max(full_at - now, 0.0)
    return Bucket(then, wait_s if wait_s > _TOLERANCE_S else 0.0, max(int(left_s / each_s + _TOLERANCE_S), 0))


def counted_address(address: Address | None) -> str:
    """Return the address that limits count by; of IPv6 the first 64 bits: the others are the client's to choose."""
    if isinstance(address, IPv6Address):
        return str(IPv6Network((address, _IPV6_NETWORK_BITS), strict=False).network_address)
    return "" if address is None else str(address)


def month_of(now: float) -> str:
    """Return the UTC month of a time since the epoch, such as "2026-11"."""
    return time.strftime("%Y-%m", time.gmtime(now))


def next_month_s(now: float) -> int:
    """Return in how many seconds the next UTC month begins."""
    told = time.gmtime(now)
    year, month = divmod(told.tm_year * 12 + told.tm_mon, 12)
    return max(1, _days_from_epoch(year, month + 1) * 86_400 - int(now))


def _days_from_epoch(year: int, month: int) -> int:
    """Return the days from 1970-01-01 to the first of a month (Gregorian)."""
    year, month = (year, month) if month > 2 else (year - 1, month + 12)
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * (month - 3) + 2) // 5 - 719_468


def duration_text(seconds: float) -> str:
    """Return a length of time as OpenAI's `x-ratelimit-reset-*` says it: 17ms, 1.2s, 6m0s, 1h0m0s."""
    if seconds < 1:
        return f"{max(round(seconds * 1000), 0)}ms"
    minutes, rest = divmod(round(seconds, 2), 60)
    if minutes < 1:
        return f"{rest:.2f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(int(minutes), 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{int(rest)}s"
