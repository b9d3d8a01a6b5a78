"""From a usage event to what the ledger keeps of it: everything a client can write made to fit."""

from __future__ import annotations

import datetime as dt
import math
import operator
import re
from typing import Any, NamedTuple

import msgspec

from billing.events import OUTCOMES, USAGE_SOURCES, Usage, UsageEvent

QUANTITY_MAX = 10**12
_PROXY_MS_MAX = 10**9
_ID_MAX_CHARS = 64
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_EARLIEST_S = 1_262_304_000.0  # 2010-01-01
_LATEST_S = 4_102_444_800.0  # 2100-01-01
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# PostgreSQL takes no NUL, and neither database a lone surrogate; control characters serve nobody.
_UNSTORABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_NOTHING = Usage()
_COUNTS = [name for name in Usage.__struct_fields__ if name != "seconds"]
_counts_of = operator.attrgetter(*_COUNTS)
_TEXTS = {
    "key_hint": 16,
    "method": 16,
    "endpoint": 96,
    "model": 128,
    "service_tier": 32,
    "upstream_request_id": 128,
}
_NUMBERS = {
    "status": 999,
    "first_byte_ms": 2**31 - 1,
    "duration_ms": 2**50,
    "request_bytes": 2**60,
    "response_bytes": 2**60,
}


class Kind(NamedTuple):
    """What events have in common that differ in time, usage, sizes and ids only: most of a batch do."""

    key_fingerprint: str
    key_hint: str
    method: str
    endpoint: str
    model: str
    service_tier: str
    is_batch: bool
    is_stream: bool
    status: int
    outcome: str
    usage_source: str


class Entry(NamedTuple):
    """An event that fits into the ledger, its times as whole microseconds.

    `quantities` are the columns of `billing.models.Quantities`, in their order.
    """

    event: UsageEvent
    kind: Kind
    started_us: int
    proxy_us: int
    quantities: tuple[int, ...]


_kind_of = operator.attrgetter(*Kind._fields)


class Intake:
    """Takes in the events of a batch, looking at what they have in common once."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[Any, ...], Kind] = {}  # that fit as they are

    def entry(self, event: UsageEvent) -> Entry:
        """Return the event as it can be stored: see `storable`. Raises UnusableEventError."""
        shared = _kind_of(event)
        kind = self._kinds.get(shared)
        if kind is None and _fits_by_kind(fresh := Kind(*shared)):
            kind = self._kinds[shared] = fresh
        counts = _counts_of(event.usage)
        if kind is None or not _fits_by_itself(event, counts):
            event = storable(event)
            kind, counts = Kind(*_kind_of(event)), _counts_of(event.usage)
        quantities = (*counts, round(event.usage.seconds * 1000))
        return Entry(event, kind, round(event.started_at * 1e6), round(event.proxy_ms * 1000), quantities)


class UnusableEventError(ValueError):
    """An event that cannot be recorded: no id, no time, or a fingerprint that is none."""


def storable(event: UsageEvent) -> UsageEvent:
    """Return the event with every text short and clean and every number in its column's range.

    Seconds are rounded to milliseconds, as they are stored: a record re-rated later costs the same. A quantity
    that cannot be becomes -1 (-1 ms): no price knows it, so that the record stays unpriced.
    Raises UnusableEventError.
    """
    if not event.id or len(event.id) > _ID_MAX_CHARS or _UNSTORABLE.search(event.id):
        raise UnusableEventError("no usable id")
    if not _EARLIEST_S <= event.started_at < _LATEST_S:
        raise UnusableEventError("no usable time")
    if not _is_fingerprint(event.key_fingerprint):
        raise UnusableEventError("no usable fingerprint")
    if event.outcome not in OUTCOMES or event.usage_source not in USAGE_SOURCES:
        raise UnusableEventError("no usable outcome")
    texts = {name: text(getattr(event, name), most_chars=most) for name, most in _TEXTS.items()}
    numbers = {name: _within(getattr(event, name), most) for name, most in _NUMBERS.items()}
    proxy_ms = round(_within(event.proxy_ms, _PROXY_MS_MAX), 3)
    return msgspec.structs.replace(event, **texts, **numbers, proxy_ms=proxy_ms, usage=_storable_usage(event.usage))


def _fits_by_kind(kind: Kind) -> bool:
    """Return whether what events share can be stored as it is."""
    texts = ((getattr(kind, name), most) for name, most in _TEXTS.items() if name in kind._fields)
    return (
        _is_fingerprint(kind.key_fingerprint)
        and kind.outcome in OUTCOMES
        and kind.usage_source in USAGE_SOURCES
        and all(text(value, most_chars=most) == value for value, most in texts)
        and 0 <= kind.status <= _NUMBERS["status"]
    )


def _fits_by_itself(event: UsageEvent, counts: tuple[int, ...]) -> bool:
    """Return whether the rest of an event can be stored as it is: nearly always, so that none is taken apart."""
    seconds = event.usage.seconds
    return (
        0 < len(event.id) <= _ID_MAX_CHARS
        and len(event.upstream_request_id) <= _TEXTS["upstream_request_id"]
        and (event.id + event.upstream_request_id).isprintable()  # so nothing in them is unstorable
        and _EARLIEST_S <= event.started_at < _LATEST_S
        and 0 <= event.first_byte_ms <= _NUMBERS["first_byte_ms"]
        and 0 <= event.duration_ms <= _NUMBERS["duration_ms"]
        and 0 <= event.request_bytes <= _NUMBERS["request_bytes"]
        and 0 <= event.response_bytes <= _NUMBERS["response_bytes"]
        and 0 <= event.proxy_ms <= _PROXY_MS_MAX
        and _is_in_thousandths(event.proxy_ms)
        and min(counts) >= 0
        and max(counts) <= QUANTITY_MAX
        and (not seconds or (0 <= seconds <= QUANTITY_MAX and _is_in_thousandths(seconds)))
    )


def _is_fingerprint(value: str) -> bool:
    return not value or _FINGERPRINT.fullmatch(value) is not None


def _is_in_thousandths(value: float) -> bool:
    # The same as round(value, 3) == value, which takes a number apart into its digits.
    return round(value * 1000) / 1000 == value


def text(value: str, *, most_chars: int) -> str:
    return _UNSTORABLE.sub("�", value[:most_chars])


def as_time(microseconds: int) -> dt.datetime:
    return _EPOCH + dt.timedelta(microseconds=microseconds)


class Hour(NamedTuple):
    """An hour of a day, in UTC."""

    day: dt.date
    hour: int


class Calendar:
    """What times are called in rows; what belongs to a second is worked out once."""

    def __init__(self, *, zone: str) -> None:
        self._zone = zone  # at the end of a time
        self._seconds: dict[int, tuple[Hour, str, str]] = {}

    def names_of(self, microseconds: int) -> tuple[Hour, str, str]:
        """Return the hour in which so long after the epoch is, that time as text, and its day as text."""
        second, microsecond = divmod(microseconds, 1_000_000)
        known = self._seconds.get(second)
        if known is None:
            at = as_time(second * 1_000_000)
            known = Hour(at.date(), at.hour), at.strftime("%Y-%m-%d %H:%M:%S"), at.date().isoformat()
            self._seconds[second] = known
        hour, text, day = known
        return hour, f"{text}.{microsecond:06}{self._zone}" if microsecond else text + self._zone, day


def usage_of(columns: Any) -> Usage:
    """Return the usage that a record's columns hold."""
    counts = {name: getattr(columns, name) for name in _COUNTS}
    return Usage(**counts, seconds=columns.audio_ms / 1000)


def is_error(*, status: int, outcome: str) -> bool:
    """Return whether a request failed; one that its own client gave up did not."""
    return status >= 400 or outcome in ("upstream_error", "timeout", "refused")


def rolled_model(*, model: str, has_key: bool, status: int, outcome: str, usage_source: str) -> str:
    """Return the model under which a request is summed up; "" where a client could invent one per request.

    Roll-ups are kept for good, so a name counts only once the upstream has acted on it.
    """
    if not has_key:
        return ""
    is_unproved = status == 0 or outcome == "refused" or (400 <= status < 500 and status != 429)
    return "" if is_unproved and usage_source == "none" else model


def _storable_usage(usage: Usage) -> Usage:
    if usage == _NOTHING:
        return usage
    counts = {name: _plausible(getattr(usage, name)) for name in _COUNTS}
    seconds = usage.seconds if 0 <= usage.seconds <= QUANTITY_MAX else -0.001
    return Usage(**counts, seconds=round(seconds, 3))


def _plausible(count: int) -> int:
    return count if 0 <= count <= QUANTITY_MAX else -1


def _within(value: Any, most: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return 0
    return min(max(value, 0), most)
