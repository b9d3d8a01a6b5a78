"""Long lists in pieces, each read at once: between two of them nothing is open in the database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.db.models import Q, QuerySet


def by_their_ids(rows: QuerySet[Any], size: int) -> Iterator[list[Any]]:
    """Yield rows in their order, up to `size` of them at a time, though that order may change meanwhile.

    All their ids are read at first: so none comes twice, and none is left out that is still there and still fits.
    """
    ids = list(rows.values_list("pk", flat=True))
    for place in range(0, len(ids), size):
        wanted = ids[place : place + size]
        found = {row.pk: row for row in rows.filter(pk__in=wanted)}
        yield [found[pk] for pk in wanted if pk in found]


def newest_first(rows: QuerySet[Any], column: str, size: int) -> Iterator[list[Any]]:
    """Yield rows in the descending order of a column and of their ids, up to `size` of them at a time.

    For tables whose ids are too many to be held. Neither may ever change, and none be NULL: each piece begins behind
    the last row of the one before it.
    """
    rows = rows.order_by(*dict.fromkeys([f"-{column}", "-pk"]))
    piece = list(rows[:size])
    while piece:
        yield piece
        piece = list(rows.filter(_behind(piece[-1], column))[:size]) if len(piece) == size else []


def _behind(row: Any, column: str) -> Q:
    """Return what holds for the rows behind one; the first part is for indexes."""
    value = getattr(row, column)
    if column == "pk":
        return Q(pk__lt=value)
    return Q(**{f"{column}__lte": value}) & (Q(**{f"{column}__lt": value}) | Q(pk__lt=row.pk))
