"""What a request cost: an operator's price if there is one for its model and time, else the list's."""

from __future__ import annotations

import bisect
import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import msgspec
from django.db import connection
from msgspec.structs import astuple

from billing.events import Usage
from billing.list_prices import CACHE_SIZE, ListPrice, list_price, row_names
from billing.models import ModelPrice, PriceSource, Pricing
from billing.pricing import TOKEN_PRICES, UNIT_PRICES, Price, Tariff, lookup_order
from billing.rows import as_time

_NOTHING = Usage()
_VERSION_MAX_CHARS = 64
_SWITCHING_PROTOCOLS = 101
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


class Rating(NamedTuple):
    """The cost columns of a record, as they are stored. `cost_units` is None exactly if `pricing` is unpriced."""

    cost_units: int | None  # tenths of a micro-dollar
    pricing: str
    price_source: str = ""
    price_version: str = ""


class FoundPrice(NamedTuple):
    price: Price
    source: str
    version: str


class Terms(NamedTuple):
    """What a tariff depends on besides its price."""

    is_batch: bool
    service_tier: str
    factor: Decimal
    requests: int


_PRICED: str = Pricing.PRICED.value
_UNPRICED: str = Pricing.UNPRICED.value
_LIST: str = PriceSource.LIST.value
_FREE = Rating(0, Pricing.FREE.value)
UNPRICED = Rating(None, _UNPRICED)


_current: tuple[list[Any], Rater] | None = None


def current_rater() -> Rater:
    """Return a rater by the prices as they are now: the one before, with one query, if none of them has changed."""
    global _current
    known = _current
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT * FROM {ModelPrice._meta.db_table} ORDER BY id")  # noqa: S608 - no data
        rows = cursor.fetchall()
    if known is None or known[0] != rows:
        known = _current = rows, Rater()
    return known[1]


class Rater:
    """Rates requests by the prices of one moment: made for many of them, with one query."""

    def __init__(self) -> None:
        self._tariffs: dict[tuple[int, Terms], tuple[Price, Tariff]] = {}
        rows = list(ModelPrice.objects.order_by("valid_from"))
        self._own = _Book(row for row in rows if row.source == PriceSource.OWN)
        self._refreshed = _RefreshedBook(row for row in rows if row.source == PriceSource.REFRESHED)

    def rate(self, request: Request, *, usage: Usage, at: dt.datetime, factor: Decimal) -> Rating:
        """Return what a request at `at` cost, times the key's factor."""
        return self.rates(request, factor=factor).rate(usage, self._find(request.model, at))

    def rates(self, request: Request, *, factor: Decimal) -> Rates:
        """Return how all requests are rated that differ from this one in time and usage only."""
        return Rates(request, tariff_of=self._tariff_of, factor=factor)

    def _tariff_of(self, price: Price, terms: Terms) -> Tariff:
        key = id(price), terms  # by its value a price takes as long to look up as a tariff to make
        known = self._tariffs.get(key)
        if known is None:
            if len(self._tariffs) >= CACHE_SIZE:
                self._tariffs.clear()
            # With its price, whose id is nobody else's for as long.
            known = self._tariffs[key] = price, Tariff(price, **terms._asdict())
        return known[1]

    def prices_of(self, model: str) -> PricesOfModel:
        return PricesOfModel(partial(self._find, model))

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
        return None if listed is None else FoundPrice(listed.price, _LIST, listed.source[:_VERSION_MAX_CHARS])


class PricesOfModel:
    """A model's prices at times many of which are in the same seconds: looked up once for each."""

    def __init__(self, find: Callable[[dt.datetime], FoundPrice | None]) -> None:
        self._find = find
        self._seconds: dict[int, tuple[FoundPrice | None, bool]] = {}

    def at(self, microseconds: int) -> FoundPrice | None:
        """Return the price so long after the epoch, None if nobody knows it."""
        found, is_steady = self.during(microseconds // 1_000_000)
        return found if is_steady else self._find(as_time(microseconds))

    def during(self, second: int) -> tuple[FoundPrice | None, bool]:
        """Return the price at the beginning of a second, and whether it is that until its end."""
        known = self._seconds.get(second)
        if known is None:
            # Lists change with whole seconds, and own prices never back: what both ends have, all between have.
            found = self._find(as_time(second * 1_000_000))
            known = self._seconds[second] = found, found == self._find(as_time(second * 1_000_000 + 999_999))
        return known


class Labels(NamedTuple):
    """What a record says of its cost besides the amount."""

    pricing: str
    price_source: str = ""
    price_version: str = ""


class Rates:
    """The rates of requests that differ in time and usage only."""

    def __init__(self, request: Request, *, tariff_of: Callable[[Price, Terms], Tariff], factor: Decimal) -> None:
        was_served = 200 <= request.status < 400 and request.outcome != "refused"
        # Who leaves before the answer begins does not know what it cost.
        was_left = request.status == 0 and request.outcome == "client_closed"
        hides_a_cost = _hides_a_cost(request)
        is_session = request.status == _SWITCHING_PROTOCOLS
        may_cost = (was_served or was_left) and bool(request.model)
        self._may_cost_without_usage = hides_a_cost if is_session else may_cost
        self._without_usage = UNPRICED if hides_a_cost else _FREE
        self._terms = Terms(request.is_batch, request.service_tier, factor, int(was_served))
        self._tariff_of = tariff_of
        self._known: RatesAtPrice | None = None

    def rate(self, usage: Usage, found: FoundPrice | None) -> Rating:
        """Return what a request with that usage cost at its model's price, None if that is not known."""
        rates = self.at(found)
        if not any(astuple(usage)):
            return rates.without_usage
        units = None if rates.tariff is None else rates.tariff.units_of(usage)
        return Rating(units, *(rates.unpriced if units is None else rates.priced))

    def at(self, found: FoundPrice | None) -> RatesAtPrice:
        """Return the rates while this is the price of the model, None if that is not known."""
        known = self._known
        if known is None or known.found is not found:
            known = self._known = self._at(found)
        return known

    def _at(self, found: FoundPrice | None) -> RatesAtPrice:
        if found is None:
            without_usage = self._without_usage if self._may_cost_without_usage else _FREE
            return RatesAtPrice(None, None, without_usage, priced=Labels(_UNPRICED), unpriced=Labels(_UNPRICED))
        tariff = self._tariff_of(found.price, self._terms)
        priced = Labels(_PRICED, found.source, found.version)
        unpriced = Labels(_UNPRICED, found.source, found.version)
        if not self._may_cost_without_usage:
            without_usage = _FREE
        elif found.price.per_request is None or not self._terms.requests:
            without_usage = self._without_usage
        else:
            units = tariff.units_of(_NOTHING)
            without_usage = Rating(units, *(unpriced if units is None else priced))
        return RatesAtPrice(found, tariff, without_usage, priced=priced, unpriced=unpriced)


@dataclass(frozen=True, slots=True)
class RatesAtPrice:
    """The rates of requests that differ in usage only. Without a tariff all of them that used anything are unpriced."""

    found: FoundPrice | None
    tariff: Tariff | None
    without_usage: Rating
    priced: Labels = field(kw_only=True)
    unpriced: Labels = field(kw_only=True)


class _Book:
    """The rows of ModelPrice of one source, by name and date."""

    def __init__(self, rows: Iterable[ModelPrice]) -> None:
        self._dated: dict[str, list[tuple[dt.datetime, FoundPrice]]] = {}
        for row in rows:
            found = FoundPrice(price_of(row), row.source, str(row.pk))
            self._dated.setdefault(row.model.lower(), []).append((row.valid_from, found))
        patterns = (name for name in self._dated if name.endswith("*"))
        self._patterns = sorted(patterns, key=len, reverse=True)
        # Bounded: a name is something that a client makes up.
        self._names_of = lru_cache(maxsize=CACHE_SIZE)(self._search)

    def find(self, model: str, at: dt.datetime) -> FoundPrice | None:
        return self._first(self._names_of(model), at) if self._dated else None

    def _first(self, names: Iterable[str], at: dt.datetime) -> FoundPrice | None:
        for name in names:
            dated = self._dated.get(name, ())
            position = bisect.bisect_right(dated, at, key=lambda entry: entry[0])
            if position:
                return dated[position - 1][1]
        return None

    def _search(self, model: str) -> list[str]:
        """Return under which names here the model's price may stand, the most exact first."""
        wanted = list(dict.fromkeys(name.lower() for name in lookup_order(model)))
        exact = [name for name in wanted if name in self._dated]
        fitting = [name for name in self._patterns if any(each.startswith(name[:-1]) for each in wanted)]
        return exact + fitting


class _RefreshedBook(_Book):
    """The rows of newer lists, which name a row of theirs, not a model that somebody asks for."""

    def find_listed(self, model: str, listed: ListPrice | None, at: dt.datetime) -> FoundPrice | None:
        """Return the price of `model`, of which the package's list says `listed`, if a newer list has another."""
        return self._first(row_names(model, listed), at) if self._dated else None


def _hides_a_cost(request: Request) -> bool:
    """Return whether an answer without any usage may have cost something all the same."""
    if request.status == _SWITCHING_PROTOCOLS:
        # A response on a WebSocket that was cut, and nothing of it could be counted: speech.
        return request.usage_source == "estimated"
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
