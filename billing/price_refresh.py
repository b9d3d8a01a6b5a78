"""Newer list prices from the network: written down as dated rows, by which every process rates from then on.

What was in force before stays in force for its time: no list is exchanged in any process's memory.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import partial
from typing import Final

import httpx2 as httpx
import msgspec
from django.conf import settings
from django.utils import timezone
from genai_prices.types import _providers_from_raw
from genai_prices.update_prices import DEFAULT_UPDATE_URL

from billing.list_prices import PACKAGE_VERSION, Catalogue, ListPrice, all_list_prices
from billing.models import MODEL_MAX_CHARS, ModelPrice, PriceSource
from billing.pricing import TOKEN_PRICES, UNIT_PRICES, Price
from billing.rating import price_of
from billing.transactions import in_ledger

# A refresh that moves a price further than this is a mistake somewhere.
MAX_CHANGE: Final = 20
# Some ten times what is published.
LIST_MAX_BYTES: Final = 16 * 1024 * 1024
_LONGEST_S: Final = 120
_LEAST_KEPT: Final = 0.9
_PROBLEM_MAX_CHARS: Final = 200


class RefreshError(Exception):
    """No new list prices; the prices stay as they are. The text says why, for the operator: no address is in it."""


def refresh_prices(*, now: dt.datetime | None = None, url: str = "", timeout_s: float = 10.0) -> int:
    """Fetch the newest list prices and write down, from now on, those that have changed; return how many.

    `url` is LIST_PRICES_URL if left out; `timeout_s` limits each wait for the network. RefreshError, and nothing is
    written, if there are none or if they make no sense: they must still have OpenAI's models, and no known model at
    more than 20 times or less than a twentieth of its price. The shipped list and what operators entered stay.
    """
    now = now or timezone.now()
    fetched = list(_fetched(url or settings.LIST_PRICES_URL or DEFAULT_UPDATE_URL, timeout_s, now))
    return in_ledger(partial(_write_changes, fetched, now), alone=True)


def _fetched(url: str, timeout_s: float, now: dt.datetime) -> Iterable[ListPrice]:
    try:
        published = json.loads(_downloaded(url, timeout_s))
        if not isinstance(published, list):
            raise ValueError("the list is no list of providers")
        prices = list(Catalogue(_providers_from_raw(published)).prices(now))
    except RefreshError:
        raise
    except httpx.HTTPStatusError as exc:
        raise RefreshError(f"HTTP status {exc.response.status_code}") from None  # its text holds the address
    except Exception as exc:  # whatever is wrong with bytes from the network: no list, no sense in it
        problem = f"{type(exc).__name__}: {exc}".splitlines()[0]
        raise RefreshError(problem[:_PROBLEM_MAX_CHARS]) from exc
    # One row cannot say a price that changes with the hour: for those the shipped list stays the only one.
    return (listed for listed in prices if not listed.is_hourly and len(listed.row) <= MODEL_MAX_CHARS)


def _downloaded(url: str, timeout_s: float) -> bytes:
    """Return what stands there. httpx.HTTPError, or RefreshError if it is too large, too slow, or packed."""
    limits = httpx.Timeout(timeout_s, connect=min(timeout_s, 5.0))
    ends_at = time.monotonic() + _LONGEST_S
    body = bytearray()
    # Packed, a few bytes may become any number.
    with httpx.stream("GET", url, timeout=limits, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        if response.headers.get("content-encoding", "identity") != "identity":
            raise RefreshError("the list came packed, which nobody asked for")
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > LIST_MAX_BYTES:
                raise RefreshError(f"the list is larger than {LIST_MAX_BYTES} bytes")
            if time.monotonic() > ends_at:
                raise RefreshError(f"the list took longer than {_LONGEST_S} s")
    return bytes(body)


def _write_changes(fetched: list[ListPrice], now: dt.datetime) -> int:
    shipped = [listed for listed in all_list_prices(now) if not listed.is_hourly]
    in_force = {listed.row: listed.price for listed in shipped} | _refreshed_before(now)
    if problem := _implausibility(in_force, shipped, fetched):
        raise RefreshError(problem)
    changed = {listed.row: listed for listed in fetched if in_force.get(listed.row) != listed.price}
    ModelPrice.objects.bulk_create([_dated(listed, now) for listed in changed.values()], ignore_conflicts=True)
    return len(changed)


def _refreshed_before(now: dt.datetime) -> dict[str, Price]:
    rows = ModelPrice.objects.filter(source=PriceSource.REFRESHED, valid_from__lte=now).order_by("valid_from")
    return {row.model: price_of(row) for row in rows}


def _dated(listed: ListPrice, now: dt.datetime) -> ModelPrice:
    rates = {name: getattr(listed.price, name) for name in (*TOKEN_PRICES, *UNIT_PRICES, "batch_factor")}
    return ModelPrice(
        model=listed.row,
        valid_from=now,
        source=PriceSource.REFRESHED,
        details=msgspec.json.decode(msgspec.json.encode(listed.price)),
        note=f"{PACKAGE_VERSION}, updated {now.astimezone(dt.UTC):%Y-%m-%d %H:%M} UTC",
        **rates,
    )


def _implausibility(in_force: Mapping[str, Price], shipped: Iterable[ListPrice], fetched: Iterable[ListPrice]) -> str:
    """Return why fetched prices are not to be believed, or "": most of OpenAI's models gone, or a price gone wild."""
    rows = {listed.row for listed in fetched}
    openai = {listed.row for listed in shipped if listed.provider == "openai"}
    kept = len(openai & rows)
    if kept < _LEAST_KEPT * len(openai):
        return f"only {kept} of {len(openai)} models of OpenAI are left"
    for listed in fetched:
        known = in_force.get(listed.row)
        for name in (*TOKEN_PRICES, *UNIT_PRICES):
            was: Decimal | None = getattr(known, name, None)
            now: Decimal | None = getattr(listed.price, name)
            if was and now is not None and not was / MAX_CHANGE <= now <= was * MAX_CHANGE:
                return f"{name} of {listed.provider}/{listed.model} went from {was} to {now}"
    return ""
