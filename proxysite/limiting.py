"""What settings and operators allow, as one worker's gateway takes it; read from the database now and then."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from django.conf import settings
from django.db import connection
from django.utils import timezone

from billing import selectors
from billing.events import UsageEvent
from billing.fields import usd_to_units
from billing.limits import NO_LIMITS, KeyLimits, KeyPolicy
from billing.reserving import Prices
from billing.transactions import reading_impatiently
from gateway import segments
from gateway.addresses import ProxyTrust
from gateway.limit_memory import MemoryStore
from gateway.limit_redis import RedisStore
from gateway.limiter import Limiter, LimiterOptions
from gateway.limits import Limits, Rules, month_of
from gateway.metering import Metering

logger = logging.getLogger("proxysite.limits")

# Clocks of several machines differ, and what was decided first may be committed last.
_OVERLAP = dt.timedelta(seconds=60)
_ALL_AGAIN_SECONDS = 3600.0
_ALL_SPENT_AGAIN_SECONDS = 600.0
_MOST_BY_NAME = 5_000
_LOCKED_MOST_SECONDS = 5.0
_KEPT_NAME = "limits.json"


@dataclass(frozen=True, slots=True)
class Decisions:
    """All that a worker must know: whom it refuses, and what the others may do."""

    blocked: frozenset[str]
    rules: Rules


def key_limits() -> Limits:
    """Return what each key may do that nothing else is decided of."""
    return Limits(
        settings.KEY_REQUESTS_PER_MINUTE,
        settings.KEY_TOKENS_PER_MINUTE,
        settings.KEY_CONCURRENT_STREAMS,
        usd_to_units(settings.KEY_MONTHLY_USD),
        tuple(settings.ALLOWED_MODELS),
        tuple(settings.ALLOWED_NETWORKS),
    )


def address_limits() -> Limits:
    return Limits(
        settings.ADDRESS_REQUESTS_PER_MINUTE,
        settings.ADDRESS_TOKENS_PER_MINUTE,
        settings.ADDRESS_CONCURRENT_STREAMS,
        usd_to_units(settings.ADDRESS_MONTHLY_USD),
    )


def uncountable_settings() -> str:
    """Return why the limits of the settings cannot be kept, "" if they can."""
    if settings.WORKERS == 1 or settings.REDIS_URL:
        return ""
    return _each_for_itself("the settings") if key_limits().counts or address_limits().counts else ""


def uncountable() -> str:
    """Return why the limits of this instance cannot be kept, "" if they can. Asks the database where it must."""
    if settings.WORKERS == 1 or settings.REDIS_URL:
        return ""
    return uncountable_settings() or (_each_for_itself("the admin") if selectors.has_key_limits() else "")


def _each_for_itself(where: str) -> str:
    return f"{settings.WORKERS} workers would each count for themselves the limits that stand in {where}"


def make_limiter(metering: Metering, prices: Prices) -> Limiter:
    """Return a worker's limiter, in force once it has rules."""
    store: MemoryStore | RedisStore = MemoryStore()
    if settings.REDIS_URL:
        store = RedisStore(
            settings.REDIS_URL, prefix=settings.REDIS_KEY_PREFIX, deadline_s=settings.LIMITS_TIMEOUT_SECONDS
        )
    sandbox = {metering.fingerprint(settings.SANDBOX_KEY.encode())} if settings.SANDBOX_ENABLED else set()
    return Limiter(
        store=store,
        prices=prices,
        trust=ProxyTrust(settings.TRUSTED_PROXIES),
        fingerprint=metering.fingerprint,
        tally=metering.tally,
        options=LimiterOptions(
            refuses_when_away=settings.ON_LIMITS_UNAVAILABLE == "refuse",
            cuts=settings.CUT_AT_SPEND_LIMIT,
            output_tokens=settings.RESERVE_OUTPUT_TOKENS,
            reasoning_tokens=settings.RESERVE_REASONING_TOKENS,
            reference_tokens=settings.RESERVE_REFERENCE_TOKENS,
            always_registered=frozenset(sandbox),
        ),
    )


def rules_at_first() -> Rules:
    """Return what holds until the database has been read: what the settings say, and of keys nothing."""
    registered = frozenset[str]() if settings.GATEWAY_MODE == "known" else None
    return Rules(key_limits(), address_limits(), registered=registered, is_read=registered is None)


class _Decided:
    """What is decided of keys, by fingerprint: in rules that are in force it is never changed, but copied."""

    __slots__ = ("factors", "limits", "registered")

    def __init__(
        self, limits: Mapping[str, Limits], factors: Mapping[str, Decimal], registered: Collection[str]
    ) -> None:
        self.limits = dict(limits)
        self.factors = dict(factors)
        self.registered = set(registered)

    def copy(self) -> _Decided:
        return _Decided(self.limits, self.factors, self.registered)

    def holds(self, policy: KeyPolicy, limits: Limits | None) -> bool:
        """Return whether all of this is known."""
        name = policy.fingerprint
        return (
            self.limits.get(name) == limits
            and self.factors.get(name, 1) == policy.price_factor
            and (name in self.registered) == policy.is_registered
        )

    def take(self, policy: KeyPolicy, limits: Limits | None) -> None:
        name = policy.fingerprint
        if limits is not None:
            self.limits[name] = limits
        else:
            self.limits.pop(name, None)
        if policy.price_factor != 1:
            self.factors[name] = policy.price_factor
        else:
            self.factors.pop(name, None)
        if policy.is_registered:
            self.registered.add(name)
        else:
            self.registered.discard(name)


class PolicyReader:
    """Reads what operators have decided: all of it at first and every hour, between that what is new.

    For any thread, one at a time. What all keys have spent is read only where every key has a limit of money, or more
    keys than one query asks for by name; then all of it now and then, between that what the keys in use have spent.
    `is_answered`: the database has answered, and what is read may take as long as it is.
    """

    def __init__(self, limiter: Limiter, prices: Prices, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock
        self._prices = prices
        self._lock = threading.Lock()
        self._rules = rules_at_first()
        self._decided = _Decided({}, {}, ())
        self._last: dt.datetime | None = None
        self._last_seen_at = 0.0
        self._all_at = -_ALL_AGAIN_SECONDS
        self._all_spent_at = -_ALL_SPENT_AGAIN_SECONDS
        self._is_first = True
        self._kept: dict[str, int] = {}
        self.is_answered = False

    def read(self) -> Decisions:
        """Return what is decided now; raises while the database is away, or keeps what is asked for locked."""
        *_, decided = self.parts()
        return decided

    def parts(self) -> Iterator[Decisions]:
        """Yield the same in two parts, as soon as they are known: whom to refuse, then what others may do."""
        with self._lock:
            try:
                with reading_impatiently(_LOCKED_MOST_SECONDS):
                    blocked = selectors.blocked_fingerprints()
                    self.is_answered = True
                    yield Decisions(blocked, self._rules)
                    yield Decisions(blocked, self._read_rules())
            except BaseException:
                # What was half read is read again.
                self._all_at = -_ALL_AGAIN_SECONDS
                raise

    def _read_rules(self) -> Rules:
        now_s = self._clock()
        is_all = now_s - self._all_at >= _ALL_AGAIN_SECONDS
        since = None if is_all else self._since(now_s)
        news = self._read_decided(since, is_all=is_all)
        rules = self._rules
        if is_all or news:
            rules = self._rules_of(self._decided)
        if _has_money(rules):
            rules = self._with_spent(rules, news)
        if is_all:
            self._all_at = now_s
        self._is_first = False
        self._rules = rules
        return rules

    def _read_decided(self, since: dt.datetime | None, *, is_all: bool) -> set[str]:
        """Bring what is decided of keys up to date; return whose it has changed, of all at once nobody's."""
        default = key_limits()
        merged: dict[KeyLimits, Limits | None] = {NO_LIMITS: None}
        decided = _Decided({}, {}, ()) if is_all else self._decided
        last, news = self._last, set[str]()
        for policy in selectors.key_policies(since):
            if policy.limits not in merged:
                merged[policy.limits] = _merged(default, policy.limits)
            limits = merged[policy.limits]
            last = policy.changed_at if last is None else max(last, policy.changed_at)
            if is_all:
                decided.take(policy, limits)
            elif not decided.holds(policy, limits):
                if not news:
                    decided = decided.copy()
                decided.take(policy, limits)
                news.add(policy.fingerprint)
        if last != self._last:
            self._last, self._last_seen_at = last, self._clock()
        self._decided = decided
        return news

    def _since(self, now_s: float) -> dt.datetime | None:
        """Return from when on there may be news: for a while from before the last, then only what comes after it.

        A hundred thousand keys may have been decided of at one time, and are not to be read every few seconds.
        """
        now = timezone.now()
        if self._last is None:
            return None
        if self._last <= now and now_s - self._last_seen_at > _OVERLAP.total_seconds():
            return self._last
        # The last may be of a clock that was ahead, and was set back since.
        return min(self._last, now) - _OVERLAP

    def _rules_of(self, decided: _Decided) -> Rules:
        return Rules(
            key_limits(),
            address_limits(),
            overrides=decided.limits,
            factors=decided.factors,
            registered=frozenset(decided.registered) if settings.GATEWAY_MODE == "known" else None,
            spent_units=self._rules.spent_units,
            month=self._rules.month,
        )

    # Money

    def _with_spent(self, rules: Rules, news: set[str]) -> Rules:
        self._prices.refresh_if_old()
        now_s = self._clock()
        today = dt.datetime.now(dt.UTC).date()
        month = f"{today:%Y-%m}"
        spent = dict(rules.spent_units) if month == rules.month else {}
        is_all = now_s - self._all_spent_at >= _ALL_SPENT_AGAIN_SECONDS or month != rules.month
        limited = {name for name, limits in rules.overrides.items() if limits.monthly_units}
        has_many = bool(rules.key.monthly_units) or len(limited) > _MOST_BY_NAME
        if has_many and is_all:
            spent = selectors.units_spent(today)
            self._all_spent_at = now_s
        else:
            asked = self._limiter.take_recent() | (limited & news if has_many else limited)
            spent |= selectors.units_spent(today, asked if len(asked) <= _MOST_BY_NAME else None)
        if self._is_first and isinstance(self._limiter.store, MemoryStore):
            for event in _unrecorded_events(settings.JOURNAL_DIR):
                if month_of(event.started_at) == month and rules.of_key(event.key_fingerprint).monthly_units:
                    cost = self._prices.cost(event, factor=rules.factor_of(event.key_fingerprint)) or 0
                    spent[event.key_fingerprint] = spent.get(event.key_fingerprint, 0) + cost
        return replace(rules, spent_units=spent, month=month)

    # What addresses have spent: in no ledger, which knows no addresses

    def restore(self) -> None:
        """Begin with what the process before this one has counted of addresses, where nobody else keeps it."""
        store = self._limiter.store
        if not (isinstance(store, MemoryStore) and address_limits().monthly_units):
            return
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads((settings.VAR_DIR / _KEPT_NAME).read_text(encoding="utf-8"))
            units = {str(name): int(count) for name, count in kept["spent"].items()}
            store.restore(units, month=str(kept["month"]))

    def keep(self) -> None:
        """Write down what addresses have spent, if it has changed; a disk that is full keeps nobody waiting."""
        store = self._limiter.store
        if not (isinstance(store, MemoryStore) and address_limits().monthly_units):
            return
        month = month_of(time.time())
        names = [name for name in store.names() if name.startswith("a:")]
        spent = store.spent_by(names, month=month)
        if spent == self._kept:
            return
        path: Path = settings.VAR_DIR / _KEPT_NAME
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"month": month, "spent": spent}, file)
            aside.replace(path)
            self._kept = spent
        except OSError as exc:
            logger.warning("what addresses have spent is not written down: %s", exc.strerror)


def read_at_start(reader: PolicyReader) -> Decisions:
    """Read everything once, on a thread that ends: it keeps no connection."""
    try:
        reader.restore()
        return reader.read()
    finally:
        connection.close()


def _has_money(rules: Rules) -> bool:
    return bool(
        rules.key.monthly_units
        or rules.address.monthly_units
        or any(limits.monthly_units for limits in rules.overrides.values())
    )


def _merged(default: Limits, own: KeyLimits) -> Limits:
    return Limits(
        _either(own.requests_per_minute, default.requests_per_minute),
        _either(own.tokens_per_minute, default.tokens_per_minute),
        _either(own.concurrent_streams, default.concurrent_streams),
        default.monthly_units if own.monthly_usd is None else usd_to_units(Decimal(own.monthly_usd)),
        default.models if own.models is None else own.models,
        default.networks if own.networks is None else own.networks,
    )


def _either(own: int | None, default: int) -> int:
    return default if own is None else own


def _unrecorded_events(directory: Path) -> Iterator[UsageEvent]:
    """Yield what dead processes have left in the journal: spent, and in no sum of the ledger's yet."""
    try:
        found = segments.survey(directory)
    except OSError:
        return
    for report in found:
        with contextlib.suppress(OSError), report.path.open("rb") as file:
            for line in file:
                text = line.rstrip(b"\n")
                event = segments.decode_line(text) if segments.is_whole(text) else None
                if event is not None:
                    yield event
