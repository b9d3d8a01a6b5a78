"""From a usage event to what the ledger keeps of it: everything a client can write made to fit."""

from __future__ import annotations

import datetime as dt
import math
import operator
import re
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec.structs import astuple

from billing.events import OUTCOMES, USAGE_SOURCES, Usage, UsageEvent
from billing.pricing import MAX_QUANTITY

_PROXY_MS_MAX = 10**9
_SWITCHING_PROTOCOLS = 101
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


_SHARED = slice(
    UsageEvent.__struct_fields__.index(Kind._fields[0]), UsageEvent.__struct_fields__.index(Kind._fields[-1]) + 1
)


def _within_bounds(kind: Any, most: int) -> Any:
    return Annotated[kind, msgspec.Meta(ge=0, le=most)]


FittingUsage = msgspec.defstruct(
    "FittingUsage",
    # Seconds take a look at their digits.
    [*((name, _within_bounds(int, MAX_QUANTITY), 0) for name in _COUNTS), ("seconds", _within_bounds(float, 0), 0.0)],
    bases=(Usage,),
    frozen=True,
    omit_defaults=True,
    gc=False,
)
# What `events_in` makes of nearly every text: the decoder has found all that is not in its `Kind` to fit as it is.
FittingEvent: Any = msgspec.defstruct(
    "FittingEvent",
    [
        ("id", Annotated[str, msgspec.Meta(min_length=1, max_length=_ID_MAX_CHARS)]),
        ("started_at", Annotated[float, msgspec.Meta(ge=_EARLIEST_S, lt=_LATEST_S)]),
        ("usage", FittingUsage, FittingUsage()),
        ("upstream_request_id", Annotated[str, msgspec.Meta(max_length=_TEXTS["upstream_request_id"])], ""),
        *((name, _within_bounds(int, most), 0) for name, most in _NUMBERS.items()),
        ("proxy_ms", _within_bounds(float, _PROXY_MS_MAX), 0.0),
    ],
    bases=(UsageEvent,),
    frozen=True,
    omit_defaults=True,
    kw_only=True,
    gc=False,
)
_fitting_in = msgspec.json.Decoder(FittingEvent).decode
_plain_in = msgspec.json.Decoder(UsageEvent).decode


def event_in(text: bytes) -> UsageEvent | None:
    """Return the event that a JSON text holds, None if it is none."""
    try:
        return _plain_in(text)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def events_in(texts: list[bytes]) -> list[UsageEvent | None]:
    """Return the same of many texts, each already looked at, so that an `Intake` need not: of another type, if it fits.

    What is unstorable, JSON has to escape, one character excepted: texts without a backslash and it hold nothing else.
    """
    found = b"".join(texts)
    if found.find(b"\\") < 0 and found.find(b"\x7f") < 0:
        try:
            return list(map(_fitting_in, texts))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return [_fitting_event_in(text) for text in texts]
    return list(map(event_in, texts))


def _fitting_event_in(text: bytes) -> UsageEvent | None:
    try:
        return _fitting_in(text)  # type: ignore[no-any-return]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return event_in(text)


class Intake:
    """Takes in the events of a batch by their kinds, each id once, looking at what they have in common once.

    `by_kind` holds them as they can be stored, only that `proxy_ms` may have more than three decimals.
    """

    def __init__(self) -> None:
        self.by_kind: dict[tuple[Any, ...], list[UsageEvent]] = {}  # the keys are each a Kind
        self._ids: set[str] = set()

    def take(self, event: UsageEvent) -> None:
        """Take an event in, made to fit: see `storable`. Raises UnusableEventError."""
        events = self.by_kind.get(astuple(event)[_SHARED])
        if events is None or not (type(event) is FittingEvent or _fits_by_itself(event)):
            event, kind = _made_to_fit(event)
            events = self.by_kind.get(kind, [])
            if event.id not in self._ids:
                self.by_kind[kind] = events
        if event.id not in self._ids:
            self._ids.add(event.id)
            events.append(event)


def _made_to_fit(event: UsageEvent) -> tuple[UsageEvent, Kind]:
    kind = Kind(*astuple(event)[_SHARED])
    if _fits_by_kind(kind) and (type(event) is FittingEvent or _fits_by_itself(event)):
        return event, kind
    event = storable(event)
    return event, Kind(*astuple(event)[_SHARED])


class UnusableEventError(ValueError):
    """An event that cannot be recorded: no id, no time, or a fingerprint that is none."""


def storable(event: UsageEvent) -> UsageEvent:
    """Return the event with every text short and clean and every number in its column's range.

    Seconds are rounded to milliseconds, as they are stored: a record re-rated later costs the same. Where a quantity
    cannot be, none of them is believed: what it has used nobody knows, so that whatever may have cost something stays
    unpriced.
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
    usage, source = event.usage, event.usage_source
    if not _can_be(usage):
        # Of a WebSocket it is what could not be estimated that is unpriced: see `billing.rating`.
        usage, source = _NOTHING, "estimated" if event.status == _SWITCHING_PROTOCOLS else "none"
    elif usage.seconds:
        usage = msgspec.structs.replace(usage, seconds=round(usage.seconds, 3))
    return msgspec.structs.replace(event, **texts, **numbers, proxy_ms=proxy_ms, usage=usage, usage_source=source)


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


def _fits_by_itself(event: UsageEvent) -> bool:
    """Return whether the rest of an event can be stored as it is."""
    counts, seconds = _counts_of(event.usage), event.usage.seconds
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
        and min(counts) >= 0
        and max(counts) <= MAX_QUANTITY
        and (not seconds or (0 <= seconds <= MAX_QUANTITY and _is_in_thousandths(seconds)))
    )


def _is_fingerprint(value: str) -> bool:
    return not value or _FINGERPRINT.fullmatch(value) is not None


def _is_in_thousandths(value: float) -> bool:
    # The same as round(value, 3) == value, which takes a number apart into its digits.
    return round(value * 1000) / 1000 == value


def text(value: str, *, most_chars: int) -> str:
    return _UNSTORABLE.sub("�", value[:most_chars])


def in_microseconds(milliseconds: float) -> int:
    """Return a time of an event's as it is stored, which is rounded to three decimals first."""
    microseconds = round(milliseconds * 1000)
    return microseconds if microseconds / 1000 == milliseconds else round(round(milliseconds, 3) * 1000)


def as_time(microseconds: int) -> dt.datetime:
    return _EPOCH + dt.timedelta(microseconds=microseconds)


class Second(NamedTuple):
    """A second of a day, in UTC: `number` is how many after the epoch, `text` all of it but its fraction."""

    number: int
    day: dt.date
    hour: int
    day_text: str
    text: str


class Calendar:
    """What the seconds of a batch are called, each worked out once."""

    def __init__(self) -> None:
        self._seconds: dict[int, Second] = {}

    def second(self, number: int) -> Second:
        """Return the second that is so many after the epoch."""
        known = self._seconds.get(number)
        if known is None:
            at = as_time(number * 1_000_000)
            text = at.strftime("%Y-%m-%d %H:%M:%S")
            known = self._seconds[number] = Second(number, at.date(), at.hour, at.date().isoformat(), text)
        return known


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


def _can_be(usage: Usage) -> bool:
    counts = _counts_of(usage)
    return min(counts) >= 0 and max(counts) <= MAX_QUANTITY and 0 <= usage.seconds <= MAX_QUANTITY


def _within(value: Any, most: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return 0
    return min(max(value, 0), most)
