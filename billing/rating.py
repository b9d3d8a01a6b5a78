"""What a request cost: an operator's price if there is one for its model and time, else the list's."""

from __future__ import annotations

import bisect
import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

import msgspec

from billing.events import Usage
from billing.fields import usd_to_units
from billing.list_prices import ListPrice, list_price, row_names
from billing.models import ModelPrice, PriceSource, Pricing
from billing.pricing import TOKEN_PRICES, UNIT_PRICES, Price, cost_of, lookup_order

_NOTHING = Usage()
_VERSION_MAX_CHARS = 64
# A POST with a model that costs nothing, so that no usage is no riddle. Those to an object that exists already, and
# batches, have cost what another record says.
_UNCHARGED_ENDPOINTS = frozenset(
    {
        "/v1/moderations",
        "/v1/assistants",
        "/v1/assistants/{assistant_id}",
        "/v1/responses/input_tokens",
        "/v1/batches",
        "/v1/batches/{batch_id}/cancel",
        "/v1/chat/completions/{completion_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/threads/{thread_id}/runs/{run_id}",
        "/v1/threads/{thread_id}/runs/{run_id}/cancel",
    }
)


class Request(Protocol):
    """What events and records have in common."""

    @property
    def method(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def service_tier(self) -> str: ...
    @property
    def is_batch(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def outcome(self) -> str: ...
    @property
    def usage_source(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Rating:
    """The cost columns of a record. `cost_usd` is None exactly if `pricing` is unpriced."""

    cost_usd: Decimal | None
    pricing: Pricing
    price_source: str = ""
    price_version: str = ""

    @property
    def cost_units(self) -> int | None:
        """The cost in tenths of a micro-dollar, as it is stored."""
        return None if self.cost_usd is None else usd_to_units(self.cost_usd)


@dataclass(frozen=True, slots=True)
class FoundPrice:
    price: Price
    source: str
    version: str


_FREE = Rating(Decimal(0), Pricing.FREE)
UNPRICED = Rating(None, Pricing.UNPRICED)


class Rater:
    """Rates requests by the prices of one moment: made for a batch of them, with one query."""

    def __init__(self) -> None:
        rows = list(ModelPrice.objects.order_by("valid_from"))
        self._own = _Book(row for row in rows if row.source == PriceSource.OWN)
        self._refreshed = _RefreshedBook(row for row in rows if row.source == PriceSource.REFRESHED)

    def rate(self, request: Request, *, usage: Usage, at: dt.datetime, factor: Decimal) -> Rating:
        """Return what a request at `at` cost, times the key's factor."""
        was_served = 200 <= request.status < 400 and request.outcome != "refused"
        if usage == _NOTHING and not (was_served and request.model):
            return _FREE
        found = self._find(request.model, at)
        if usage == _NOTHING and (found is None or found.price.per_request is None):
            return UNPRICED if _hides_a_cost(request) else _FREE
        if found is None:
            return UNPRICED
        costing = cost_of(
            usage,
            found.price,
            is_batch=request.is_batch,
            service_tier=request.service_tier,
            factor=factor,
            requests=int(was_served),
        )
        pricing = Pricing.UNPRICED if costing.amount_usd is None else Pricing.PRICED
        return Rating(costing.amount_usd, pricing, found.source, found.version)

    def price_at(self, model: str, at: dt.datetime) -> Price | None:
        """Return the price of a model by these rules, None if nobody knows it."""
        found = self._find(model, at)
        return None if found is None else found.price

    def _find(self, model: str, at: dt.datetime) -> FoundPrice | None:
        # What an operator has entered goes before a newer list, also where it is older.
        if found := self._own.find(model, at):
            return found
        listed = list_price(model, at)
        if found := self._refreshed.find_listed(model, listed, at):
            return found
        return (
            None if listed is None else FoundPrice(listed.price, PriceSource.LIST, listed.source[:_VERSION_MAX_CHARS])
        )


class _Book:
    """The rows of ModelPrice of one source, by name and date."""

    def __init__(self, rows: Iterable[ModelPrice]) -> None:
        self._dated: dict[str, list[tuple[dt.datetime, FoundPrice]]] = {}
        for row in rows:
            found = FoundPrice(price_of(row), row.source, str(row.pk))
            self._dated.setdefault(row.model.lower(), []).append((row.valid_from, found))
        patterns = (name for name in self._dated if name.endswith("*"))
        self._patterns = sorted(patterns, key=len, reverse=True)
        self._names: dict[str, list[str]] = {}

    def find(self, model: str, at: dt.datetime) -> FoundPrice | None:
        return self._first(self._names_of(model), at) if self._dated else None

    def _first(self, names: Iterable[str], at: dt.datetime) -> FoundPrice | None:
        for name in names:
            dated = self._dated.get(name, ())
            position = bisect.bisect_right(dated, at, key=lambda entry: entry[0])
            if position:
                return dated[position - 1][1]
        return None

    def _names_of(self, model: str) -> list[str]:
        """Return under which names here the model's price may stand, the most exact first."""
        if model not in self._names:
            wanted = list(dict.fromkeys(name.lower() for name in lookup_order(model)))
            exact = [name for name in wanted if name in self._dated]
            fitting = [name for name in self._patterns if any(each.startswith(name[:-1]) for each in wanted)]
            self._names[model] = exact + fitting
        return self._names[model]


class _RefreshedBook(_Book):
    """The rows of newer lists, which name a row of theirs, not a model that somebody asks for."""

    def find_listed(self, model: str, listed: ListPrice | None, at: dt.datetime) -> FoundPrice | None:
        """Return the price of `model`, of which the package's list says `listed`, if a newer list has another."""
        return self._first(row_names(model, listed), at) if self._dated else None


def _hides_a_cost(request: Request) -> bool:
    """Return whether an answer without any usage may have cost something all the same."""
    return request.usage_source == "none" and request.method == "POST" and request.endpoint not in _UNCHARGED_ENDPOINTS


def price_of(row: ModelPrice) -> Price:
    """Return what a row says, as a price."""
    if row.details is not None:
        return msgspec.convert(row.details, Price)
    rates = {name: getattr(row, name) for name in (*TOKEN_PRICES, *UNIT_PRICES)}
    factors = {"flex": row.flex_factor, "priority": row.priority_factor}
    return Price(
        **rates,
        batch_factor=row.batch_factor,
        service_tiers={tier: factor for tier, factor in factors.items() if factor is not None},
    )
