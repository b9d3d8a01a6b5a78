"""What a request costs: quantities times prices, in exact decimals. Pure: no clock, no I/O, no database.

One rule above all: what has no known price is `unpriced`, never 0. A request is priced only if everything in it
that costs money has a price, its own or one of the fallbacks below, each of which is the provider's own rule.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from functools import partial
from typing import Final

from billing.events import Usage

TENTH_OF_A_MICRO_DOLLAR: Final = Decimal("0.0000001")
MILLION: Final = Decimal(1_000_000)
MAX_MODEL_LENGTH: Final = 200
# Of a kind that has no price: far more than anything can cost, so that a sum with one of them in it shows.
_UNPRICED_WEIGHT: Final = 10**100
# More than any request can hold. A count above it is an upstream's mistake or somebody's joke; a bill for it is both.
MAX_QUANTITY: Final = 10**12
MAX_PRICE: Final = Decimal(10**9)
# Of one request. What costs more is charged as this: sums of it fit into a database's whole numbers, and a request that
# costs too much to be true is not free.
MAX_COST_USD: Final = Decimal(10**8)
# Twice the digits that the largest quantity, price, long-context multiplier and factor can need together.
_EXACT: Final = Context(prec=60, rounding=ROUND_HALF_UP)

# Where a bucket's price is looked for, in this order. What is not here has no fallback:
# - cached input without a price of its own: in full, as OpenAI bills models without a cache discount (gpt-5-pro);
# - cache writes: as input, since a surcharge is the exception and listed where there is one;
# - images read by a chat model are turned into tokens and billed as text; cached ones as cached text;
# - audio in and out, and images drawn: none. They cost a model's text price several times over, so its text price
#   would be a wrong bill, not an approximate one.
FALLBACKS: Final[Mapping[str, tuple[str, ...]]] = {
    "input": ("input",),
    "cached_input": ("cached_input", "input"),
    "cache_write": ("cache_write", "input"),
    "output": ("output",),
    "audio_input": ("audio_input",),
    "cached_audio_input": ("cached_audio_input", "audio_input"),
    "audio_output": ("audio_output",),
    "image_input": ("image_input", "input"),
    "cached_image_input": ("cached_image_input", "image_input", "cached_input", "input"),
    "image_output": ("image_output",),
}
TOKEN_PRICES: Final = tuple(FALLBACKS)
_BUCKETS: Final = tuple((f"{bucket}_tokens", sources) for bucket, sources in FALLBACKS.items())
UNIT_PRICES: Final = ("per_image", "per_million_characters", "per_minute", "per_request")
_INPUT_BUCKETS: Final = tuple(f"{name}_tokens" for name in TOKEN_PRICES if not name.endswith("output"))

# Quantity of Usage: its price, what divides it, and the token buckets that prove that the same work is already
# priced by the token. gpt-image-1 reports an image and its tokens; if the tokens it drew are not there, the image
# is a cost that nobody counted. Characters spoken cost their audio, seconds heard cost their audio tokens.
_UNITS: Final[tuple[tuple[str, str, Decimal, tuple[str, ...]], ...]] = (
    ("images", "per_image", Decimal(1), ("image_output_tokens", "output_tokens")),
    ("characters", "per_million_characters", MILLION, ("audio_output_tokens", "output_tokens")),
    ("seconds", "per_minute", Decimal(60), ("audio_input_tokens", "cached_audio_input_tokens", "audio_output_tokens")),
)

_COUNTS: Final = tuple(name for name in Usage.__struct_fields__ if name != "seconds")
_counts_of = operator.attrgetter(*_COUNTS)
_tokens_of = operator.attrgetter(*(bucket for bucket, _ in _BUCKETS))
_units_of = operator.attrgetter(*(unit for unit, *_ in _UNITS))

# "scale" is capacity bought beforehand; what a request used of it is rated like any other.
_STANDARD_TIERS: Final = frozenset({"", "auto", "default", "standard", "on_demand", "scale"})

# First part of names such as "openai/gpt-4o" or "models/gemini-2.5-pro", and the price list it points to.
PROVIDER_OF_PREFIX: Final[Mapping[str, str]] = {
    "openai": "openai",
    "azure": "openai",
    "anthropic": "anthropic",
    "cohere": "cohere",
    "deepseek": "deepseek",
    "gemini": "google",
    "google": "google",
    "models": "google",
    "minimax": "minimax",
    "mistral": "mistral",
    "mistralai": "mistral",
    "moonshot": "moonshotai",
    "moonshotai": "moonshotai",
    "perplexity": "perplexity",
    "x-ai": "x-ai",
    "xai": "x-ai",
    "z-ai": "zai",
    "zai": "zai",
    "zhipuai": "zhipuai",
}

_FINE_TUNED = re.compile(r"(ft:[^:]+):.*", re.DOTALL)
_SNAPSHOT = re.compile(r"(.+)-20\d\d-[01]\d-[0-3]\d", re.DOTALL)
# gpt-4-0613, gpt-3.5-turbo-0125, tts-1-1106: month and day, OpenAI's habit until 2024. Not other makers': a
# mistral-large-2402 cost three times the mistral-large of today.
_SHORT_SNAPSHOT = re.compile(r"((?:ft:)?(?:gpt|tts)-.+)-[01]\d[0-3]\d", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LongContext:
    """Prices of the whole request once its input, cached tokens included, is more than `above_input_tokens`.

    `overrides` names token prices of `Price`; a price that it does not name stays.
    """

    above_input_tokens: int
    overrides: Mapping[str, Decimal] = field(hash=False)

    def __post_init__(self) -> None:
        if self.above_input_tokens < 0:
            raise ValueError("above_input_tokens is negative")
        for name, value in self.overrides.items():
            if name not in FALLBACKS:
                raise ValueError(f"{name!r} is no token price")
            _require_amount(name, value)


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, in USD; the first ten are per million tokens. None is unknown, Decimal(0) is free.

    Prices add up: a model with a price per token and one per image costs both. `per_request` is for each request.
    `batch` is the whole price list of the Batch API; where there is none, `batch_factor` times this one, and where
    that is None the batch price is unknown. `service_tiers` holds, by OpenAI's `service_tier`, either a multiplier
    of this price or a price of its own, used as it is (its own tiers and batch price are not looked at).
    """

    input: Decimal | None = None
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    output: Decimal | None = None
    audio_input: Decimal | None = None
    cached_audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None
    cached_image_input: Decimal | None = None
    image_output: Decimal | None = None
    per_image: Decimal | None = None
    per_million_characters: Decimal | None = None
    per_minute: Decimal | None = None
    per_request: Decimal | None = None
    long_context: tuple[LongContext, ...] = ()
    batch_factor: Decimal | None = Decimal("0.5")
    batch: Price | None = None
    service_tiers: Mapping[str, Decimal | Price] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in (*TOKEN_PRICES, *UNIT_PRICES, "batch_factor"):
            value = getattr(self, name)
            if value is not None:
                _require_amount(name, value)
        for tier, tier_price in self.service_tiers.items():
            if not isinstance(tier_price, Price):
                _require_amount(tier, tier_price)

    @property
    def is_by_token(self) -> bool:
        """Whether tokens of any kind have a price; a model sold by the minute or character alone has none."""
        return any(getattr(self, name) is not None for name in TOKEN_PRICES)

    @property
    def is_empty(self) -> bool:
        """Whether it prices nothing at all."""
        return not self.is_by_token and all(getattr(self, name) is None for name in UNIT_PRICES)


@dataclass(frozen=True, slots=True)
class Costing:
    """The cost of one request. `amount_usd` has 7 decimals; None is unpriced, and `missing` says for want of what.

    It is `MAX_COST_USD` at most, whatever the parts come to.

    `parts` are the exact summands before rounding, by quantity of `Usage` (and `requests`), the factor included;
    only what was used is in it. `missing` holds quantities of `Usage`, or `price`, `service_tier`, `batch`.
    """

    amount_usd: Decimal | None
    parts: Mapping[str, Decimal] = field(default_factory=dict, hash=False)
    missing: tuple[str, ...] = ()

    @property
    def is_priced(self) -> bool:
        return self.amount_usd is not None


def cost_of(
    usage: Usage,
    price: Price | None,
    *,
    is_batch: bool = False,
    service_tier: str = "",
    factor: Decimal = Decimal(1),
    requests: int = 1,
) -> Costing:
    """Return what `usage` costs at `price`, times `factor` (a discount or a markup); unpriced if any part of it is.

    `service_tier` is the one that the upstream says it used; a batch has only one tier, so `is_batch` outweighs it.
    `requests` is how often `per_request` is charged: 0 for a request that the upstream refused.
    Usage of nothing costs 0 at any price; a count that cannot be (negative, not finite, beyond reason) is unpriced.
    Raises ValueError if `factor` is not a Decimal of 0 or more.
    """
    if price is None:
        return Costing(None, missing=("price",))
    applicable = _applicable(price, is_batch=is_batch, service_tier=service_tier.strip().lower())
    if applicable is None:
        return Costing(None, missing=("batch" if is_batch else "service_tier",))
    rates, multiplier = applicable
    # Not a number fails this comparison too.
    if not (
        min(counts := _counts_of(usage)) >= 0 and max(counts) <= MAX_QUANTITY and 0 <= usage.seconds <= MAX_QUANTITY
    ):
        absurd = (name for name in Usage.__struct_fields__ if not 0 <= getattr(usage, name) <= MAX_QUANTITY)
        return Costing(None, missing=tuple(absurd))
    _require_amount("factor", factor)
    with localcontext(_EXACT):
        multiplier *= factor
        parts: dict[str, Decimal] = {}
        missing = [
            *_add_tokens(parts, usage, rates),
            *_add_units(parts, usage, rates),
        ]
        if missing:
            return Costing(None, missing=tuple(missing))
        if rates.per_request is not None and requests:
            parts["requests"] = rates.per_request * requests
        if multiplier != 1:
            parts = {name: part * multiplier for name, part in parts.items()}
        amount_usd = min(sum(parts.values(), Decimal(0)), MAX_COST_USD)
        return Costing(amount_usd.quantize(TENTH_OF_A_MICRO_DOLLAR), parts)


class Tariff:
    """What `cost_of` says at one price, tier and factor, for many requests: in tenths of a micro-dollar, as integers.

    Sums of tokens times whole numbers cost a thirtieth of decimals. What else a usage may hold (units, long context,
    kinds without a price, counts that cannot be) is left to `cost_of`.
    """

    def __init__(
        self,
        price: Price,
        *,
        is_batch: bool = False,
        service_tier: str = "",
        factor: Decimal = Decimal(1),
        requests: int = 1,
    ) -> None:
        self._cost_of = partial(
            cost_of, price=price, is_batch=is_batch, service_tier=service_tier, factor=factor, requests=requests
        )
        applicable = _applicable(price, is_batch=is_batch, service_tier=service_tier.strip().lower())
        rates, multiplier = applicable or (Price(), Decimal(1))
        steps = (step.above_input_tokens for step in rates.long_context)
        # Of all counts together, so that one of the tokens read is not more either; nothing where there is no price.
        self._most = min((MAX_QUANTITY, *steps)) if applicable else -1
        with localcontext(_EXACT):
            multiplier *= factor
            known = {bucket: _first_known(rates, {}, sources) for bucket, sources in _BUCKETS}
            known["reasoning_tokens"] = Decimal(0)
            found = (known.get(count) for count in _COUNTS)
            each = [None if rate is None else rate * multiplier for rate in found]
            once = (rates.per_request or Decimal(0)) * requests * multiplier * MILLION
            scale = 10 ** max(0, *(-_exponent(amount) for amount in (once, *each) if amount is not None))
            # Per million, and ten million units are a dollar: tenfold. Twice that, plus one whole, is half up.
            self._weights = tuple(_UNPRICED_WEIGHT if amount is None else int(amount * scale) * 20 for amount in each)
            self._text_weights = self._weights[:4]  # reasoning tokens weigh nothing
            self._base = int(once * scale) * 20 + scale
            self._divisor: int = 2 * scale
            # Below the weight of what is unpriced, too.
            self._dearest: int = int(MAX_COST_USD.scaleb(7)) * self._divisor

    def units_of(self, usage: Usage) -> int | None:
        """Return what a usage costs, None if it is unpriced."""
        counts = _counts_of(usage)
        if not usage.seconds and min(counts) >= 0 and sum(counts) <= self._most:
            total: int = sum(map(operator.mul, self._weights, counts), self._base)
            if total < self._dearest:
                return total // self._divisor
        amount_usd = self._cost_of(usage).amount_usd
        return None if amount_usd is None else int(amount_usd.scaleb(7))

    def units_of_text(self, usage: Usage, counts: tuple[int, ...]) -> int | None:
        """The same of a usage that has none but text tokens, at a third: `counts` are its first five."""
        fresh, cached, written, output, reasoning = counts
        # All of them together are negative if one of them is.
        if fresh | cached | written | output | reasoning >= 0 and sum(counts) <= self._most:
            weights = self._text_weights
            total: int = (
                self._base + weights[0] * fresh + weights[1] * cached + weights[2] * written + weights[3] * output
            )
            if total < self._dearest:
                return total // self._divisor
        return self.units_of(usage)


def _exponent(amount: Decimal) -> int:
    return int(amount.as_tuple().exponent)


def lookup_order(model: str) -> list[str]:
    """Return the names under which the price of `model` may stand, the most exact first; [] if it is no name.

    The name, without its provider (`openai/gpt-4o`), without the owner of a fine-tuning (`ft:gpt-4o:acme::id` is
    `ft:gpt-4o`, and never `gpt-4o`, which costs less), and then each of them without its date.
    """
    model = model.strip()
    if not model or len(model) > MAX_MODEL_LENGTH or not model.isprintable():
        return []
    names = [model, model.lower()]
    prefix, slash, bare = names[1].partition("/")
    if slash and bare and prefix in PROVIDER_OF_PREFIX:
        names.append(bare)
    names += [found[1] for name in names if (found := _FINE_TUNED.fullmatch(name))]
    names += [found[1] for name in names if (found := _SNAPSHOT.fullmatch(name) or _SHORT_SNAPSHOT.fullmatch(name))]
    return list(dict.fromkeys(names))


def _applicable(price: Price, *, is_batch: bool, service_tier: str) -> tuple[Price, Decimal] | None:
    """Return the price list to use and its multiplier, or None if this batch or tier has no known price."""
    if is_batch or service_tier == "batch":
        return _batch(price)
    if service_tier in _STANDARD_TIERS:
        return price, Decimal(1)
    tier = price.service_tiers.get(service_tier)
    if isinstance(tier, Price):
        return tier, Decimal(1)
    if tier is not None:
        return price, tier
    # "Tokens are priced at Batch API rates": OpenAI's guide to flex processing.
    return _batch(price) if service_tier == "flex" else None


def _batch(price: Price) -> tuple[Price, Decimal] | None:
    if price.batch is not None:
        return price.batch, Decimal(1)
    return None if price.batch_factor is None else (price, price.batch_factor)


def _add_tokens(parts: dict[str, Decimal], usage: Usage, rates: Price) -> Iterator[str]:
    """Add the cost of each kind of token to `parts`; yield those that have no price."""
    overrides = _long_context(usage, rates)
    for (bucket, sources), quantity in zip(_BUCKETS, _tokens_of(usage), strict=True):
        if not quantity:
            continue
        rate = _first_known(rates, overrides, sources)
        if rate is not None:
            parts[bucket] = rate * quantity / MILLION
        elif not _is_sold_by_unit(usage, rates):
            yield bucket


def _add_units(parts: dict[str, Decimal], usage: Usage, rates: Price) -> Iterator[str]:
    """Add the cost of images, characters and seconds to `parts`; yield those that neither they nor tokens price."""
    if not any(quantities := _units_of(usage)):
        return
    for (unit, name, divisor, covered_by), quantity in zip(_UNITS, quantities, strict=True):
        if not quantity:
            continue
        rate: Decimal | None = getattr(rates, name)
        if rate is not None:
            # str(): the decimal that was written, not the binary fraction next to it.
            parts[unit] = rate * Decimal(str(quantity)) / divisor
        elif parts.keys().isdisjoint(covered_by) and not _is_sold_by_unit(usage, rates):
            yield unit


def _is_sold_by_unit(usage: Usage, rates: Price) -> bool:
    """Return whether this model has no price per token and another unit of this request is priced: the bill is whole.

    Whisper is sold by the minute: tokens estimated from its text cost nothing on top, but cannot replace the minutes.
    """
    if rates.is_by_token:
        return False
    return any(getattr(rates, name) is not None and getattr(usage, unit) for unit, name, _, _ in _UNITS) or (
        rates.per_request is not None
    )


def _long_context(usage: Usage, rates: Price) -> Mapping[str, Decimal]:
    """Return the prices that this much input changes. One threshold counts, the highest passed, for every token."""
    if not rates.long_context:
        return {}
    input_tokens = sum(getattr(usage, bucket) for bucket in _INPUT_BUCKETS)
    passed = [step for step in rates.long_context if input_tokens > step.above_input_tokens]
    return max(passed, key=lambda step: step.above_input_tokens).overrides if passed else {}


def _first_known(rates: Price, overrides: Mapping[str, Decimal], sources: tuple[str, ...]) -> Decimal | None:
    for source in sources:
        rate: Decimal | None = overrides.get(source, getattr(rates, source))
        if rate is not None:
            return rate
    return None


def _require_amount(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a Decimal from 0 to `MAX_PRICE`: a float here would spoil every sum."""
    if not isinstance(value, Decimal) or not value.is_finite() or not 0 <= value <= MAX_PRICE:
        raise ValueError(f"{name} must be a Decimal from 0 to {MAX_PRICE}, not {value!r}")
