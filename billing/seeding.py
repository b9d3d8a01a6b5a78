"""Usage that never happened, the same for the same arguments: for tests, benchmarks and demonstrations."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

import msgspec
from django.db import connection, transaction

from billing.events import Usage, UsageEvent
from billing.keys import fingerprint
from billing.models import ApiKey, Grant, UsageRecord
from billing.rating import Rater
from billing.recording import COLUMNS, sheets
from billing.rollups import rebuild_usage_days
from billing.rows import Intake

_RECORDS_PER_CHUNK = 50_000
_KINDS_PER_DAY = 80
_GRANT_USD = Decimal(500)
_VARYING = ("event_id", "key_id", "started_at", "first_byte_ms", "duration_ms", "proxy_us")
# Endpoint, model, how often in a hundred.
_MIX = (
    ("/v1/chat/completions", "gpt-4o-mini", 30),
    ("/v1/chat/completions", "gpt-4o", 15),
    ("/v1/chat/completions", "gpt-4.1-mini", 10),
    ("/v1/responses", "gpt-5", 14),
    ("/v1/responses", "gpt-5-mini", 10),
    ("/v1/embeddings", "text-embedding-3-small", 12),
    ("/v1/chat/completions", "o4-mini", 5),
    ("/v1/chat/completions", "in-house-model", 2),
    ("/v1/models", "", 2),
)
_ENDINGS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"status": 200, "outcome": "completed", "usage_source": "upstream"}, 93),
    ({"status": 200, "outcome": "client_closed", "usage_source": "estimated"}, 3),
    ({"status": 429, "outcome": "completed", "usage_source": "none"}, 2),
    ({"status": 500, "outcome": "completed", "usage_source": "none"}, 1),
    ({"status": 502, "outcome": "upstream_error", "usage_source": "none"}, 1),
)


class AlreadySeededError(Exception):
    """There is such usage already: more of it would carry the same ids."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What many requests of one day have in common: the columns that do not vary, also as text for COPY."""

    constants: tuple[Any, ...]
    text: str

    @classmethod
    def of(cls, values: Iterable[Any]) -> _Kind:
        plain = tuple(str(value) if isinstance(value, Decimal | dt.date) else value for value in values)
        # Nothing in a seeded row needs an escape.
        return cls(plain, "\t".join(["\\N" if value is None else str(value) for value in plain]))


_Row = tuple[tuple[Any, ...], _Kind]


def seed_usage(
    records: int,
    *,
    keys: int = 100,
    days: int = 90,
    until: dt.date,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Enter that many requests of that many keys, evenly over the days that end with `until`, and their roll-ups.

    Raises AlreadySeededError.
    """
    first_day = until - dt.timedelta(days=days - 1)
    key_ids = _make_keys(keys, first_used=first_day, last_used=until)
    rows = _rows(random.Random(seed), records, key_ids=key_ids, first_day=first_day, days=days)  # noqa: S311
    constant = tuple(name for name in COLUMNS if name not in _VARYING)
    while chunk := list(islice(rows, _RECORDS_PER_CHUNK)):
        with transaction.atomic():
            _insert(chunk, columns=(*_VARYING, *constant))
        if progress is not None:
            progress(len(chunk))
    rebuild_usage_days(first_day, until)


def _make_keys(count: int, *, first_used: dt.date, last_used: dt.date) -> list[int]:
    prints = [fingerprint(b"seed %d" % number, pepper=b"seed") for number in range(count)]
    if UsageRecord.objects.filter(key__fingerprint__in=prints).exists():
        raise AlreadySeededError
    first, last = (dt.datetime.combine(day, dt.time(), dt.UTC) for day in (first_used, last_used))
    made = [
        ApiKey(
            fingerprint=fingerprint_,
            hint=f"sk-…{number:04d}",
            label=f"Seed {number:04d}",
            owner="demonstration",
            first_used_at=first,
            last_used_at=last,
            created_at=first,
        )
        for number, fingerprint_ in enumerate(prints)
    ]
    ApiKey.objects.bulk_create(made, ignore_conflicts=True, batch_size=1000)
    key_ids = list(ApiKey.objects.filter(fingerprint__in=prints).order_by("hint").values_list("pk", flat=True))
    grants = [Grant(key_id=pk, amount_usd=_GRANT_USD, reason="demonstration", valid_from=first) for pk in key_ids]
    Grant.objects.bulk_create(grants, batch_size=1000)
    return key_ids


def _rows(rng: random.Random, records: int, *, key_ids: list[int], first_day: dt.date, days: int) -> Iterator[_Row]:
    """Yield rows in the order of time: the varying columns, and the others."""
    rater, step = Rater(), dt.timedelta(days=days) / max(records, 1)
    at = dt.datetime.combine(first_day, dt.time(), dt.UTC)
    kinds: list[_Kind] = []
    kinds_day = None
    for number in range(records):
        if at.date() != kinds_day:
            kinds_day = at.date()
            kinds = [_kind(rng, rater, at) for _ in range(_KINDS_PER_DAY)]
        kind = kinds[int(rng.random() * _KINDS_PER_DAY)]
        key_id = key_ids[int(rng.random() ** 3 * len(key_ids))]
        first_byte_ms = 150 + int(rng.random() ** 2 * 1500)
        event_id = f"{int(at.timestamp() * 1000):012x}{number:08x}seed"
        yield (event_id, key_id, at, first_byte_ms, 4 * first_byte_ms, 100 + first_byte_ms // 8), kind
        at += step


def _kind(rng: random.Random, rater: Rater, at: dt.datetime) -> _Kind:
    endpoint, model, _ = rng.choices(_MIX, [share for *_, share in _MIX])[0]
    ending, _ = rng.choices(_ENDINGS, [share for _, share in _ENDINGS])[0]
    event = UsageEvent(
        id="seed",
        started_at=at.timestamp(),
        method="POST" if model else "GET",
        endpoint=endpoint,
        model=model,
        is_stream=rng.random() < 0.6,
        request_bytes=rng.randrange(200, 20_000),
        response_bytes=rng.randrange(300, 30_000),
        **ending,
    )
    if model and event.usage_source != "none":
        event = msgspec.structs.replace(event, usage=_usage(rng, is_embedding="embed" in model))
    intake = Intake()
    intake.take(event)
    (sheet,) = sheets(intake.by_kind, {}, rater)
    values = dict.fromkeys(COLUMNS, 0) | sheet.columns(0)
    return _Kind.of(value for name, value in values.items() if name not in _VARYING)


def _usage(rng: random.Random, *, is_embedding: bool) -> Usage:
    if is_embedding:
        return Usage(input_tokens=rng.randrange(10, 8_000))
    output_tokens = rng.randrange(1, 2_000)
    return Usage(
        input_tokens=rng.randrange(20, 6_000),
        cached_input_tokens=rng.choice([0, 0, 1024, 2048]),
        output_tokens=output_tokens,
        reasoning_tokens=rng.choice([0, output_tokens // 2]),
    )


def _insert(rows: list[_Row], *, columns: tuple[str, ...]) -> None:
    table, names = UsageRecord._meta.db_table, ", ".join(columns)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            with cursor.copy(f"COPY {table} ({names}) FROM STDIN") as copy:
                copy.write("".join(["\t".join(map(str, (*row, kind.text))) + "\n" for row, kind in rows]))
        else:
            adapt = connection.ops.adapt_datetimefield_value
            places = ", ".join(["%s"] * len(columns))
            cursor.executemany(
                f"INSERT INTO {table} ({names}) VALUES ({places})",  # noqa: S608 - no data
                [(*row[:2], adapt(row[2]), *row[3:], *kind.constants) for row, kind in rows],
            )
