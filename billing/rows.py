"""From a usage event to what the ledger keeps of it: everything a client can write made to fit."""

from __future__ import annotations

import datetime as dt
import math
import operator
import re
from typing import Any

import msgspec

from billing.events import OUTCOMES, USAGE_SOURCES, Usage, UsageEvent

QUANTITY_MAX = 10**12
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


_texts_of = operator.attrgetter(*_TEXTS)
_numbers_of = operator.attrgetter(*_NUMBERS)
_TEXT_SIZES, _NUMBER_SIZES = tuple(_TEXTS.values()), tuple(_NUMBERS.values())


class UnusableEventError(ValueError):
    """An event that cannot be recorded: no id, no time, or a fingerprint that is none."""


def storable(event: UsageEvent) -> UsageEvent:
    """Return the event with every text short and clean and every number in its column's range.

    Seconds are rounded to milliseconds, as they are stored: a record re-rated later costs the same. A quantity
    that cannot be becomes -1 (-1 ms): no price knows it, so that the record stays unpriced.
    Raises UnusableEventError.
    """
    if not event.id or len(event.id) > 64 or _UNSTORABLE.search(event.id):
        raise UnusableEventError("no usable id")
    if not _EARLIEST_S <= event.started_at < _LATEST_S:
        raise UnusableEventError("no usable time")
    if event.key_fingerprint and not _FINGERPRINT.fullmatch(event.key_fingerprint):
        raise UnusableEventError("no usable fingerprint")
    if event.outcome not in OUTCOMES or event.usage_source not in USAGE_SOURCES:
        raise UnusableEventError("no usable outcome")
    if _fits(event):
        return event
    texts = {name: text(getattr(event, name), most_chars=most) for name, most in _TEXTS.items()}
    numbers = {name: _within(getattr(event, name), most) for name, most in _NUMBERS.items()}
    proxy_ms = round(_within(event.proxy_ms, 10**9), 3)
    return msgspec.structs.replace(event, **texts, **numbers, proxy_ms=proxy_ms, usage=_storable_usage(event.usage))


def _fits(event: UsageEvent) -> bool:
    """Return whether an event can be stored as it is: nearly all can, and need not be taken apart."""
    texts = _texts_of(event)
    if any(map(operator.gt, map(len, texts), _TEXT_SIZES)) or _UNSTORABLE.search("".join(texts)):
        return False
    numbers = _numbers_of(event)
    if min(numbers) < 0 or any(map(operator.gt, numbers, _NUMBER_SIZES)):
        return False
    if not 0 <= event.proxy_ms <= 10**9 or round(event.proxy_ms, 3) != event.proxy_ms:
        return False
    usage = event.usage
    counts = _counts_of(usage)
    plausible = min(counts) >= 0 and max(counts) <= QUANTITY_MAX and 0 <= usage.seconds <= QUANTITY_MAX
    return plausible and round(usage.seconds, 3) == usage.seconds


def text(value: str, *, most_chars: int) -> str:
    return _UNSTORABLE.sub("�", value[:most_chars])


def started_at(event: UsageEvent) -> dt.datetime:
    return _EPOCH + dt.timedelta(microseconds=round(event.started_at * 1e6))


def quantities(usage: Usage) -> tuple[int, ...]:
    """Return the columns of `billing.models.Quantities`, in their order."""
    return (*_counts_of(usage), round(usage.seconds * 1000))


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
