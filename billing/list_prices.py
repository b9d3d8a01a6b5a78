"""List prices: what providers publish, read from the data in the `genai-prices` package. No network, no database.

Two things are ours: how the package's rows become a `Price`, and `EXTRA`, a table of what the package leaves out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import cache, lru_cache
from typing import Final

import genai_prices
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import (
    ModelInfo,
    ModelPrice,
    PriceVariant,
    Provider,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)

from billing.pricing import PROVIDER_OF_PREFIX, TOKEN_PRICES, UNIT_PRICES, LongContext, Price, lookup_order

PACKAGE_VERSION: Final = f"genai-prices {genai_prices.__version__}"
OWN_TABLE: Final = "own table"

# Model names come from clients; this many are remembered, whoever asks. Names in use stay: the least recent goes.
CACHE_SIZE: Final = 4096

# Whose price list a name without a provider is on, by how it begins. Only makers who sell the model themselves under
# this name. Not here, so unpriced without a ModelPrice row or a provider before the name: open weights, whose price is
# the host's (gpt-oss, llama, qwen: the package has those at resellers only), and GLM, which has two lists, z.ai's and
# zhipuai's, that differ.
_OWNER_OF_NAME: Final = (
    ("claude", "anthropic"),
    ("command-", "cohere"),
    ("deepseek-", "deepseek"),
    ("gemini-", "google"),
    ("grok-", "x-ai"),
    ("kimi-", "moonshotai"),
    ("moonshot-", "moonshotai"),
    ("minimax-", "minimax"),
    ("mistral-", "mistral"),
    ("ministral-", "mistral"),
    ("codestral-", "mistral"),
    ("devstral-", "mistral"),
    ("magistral-", "mistral"),
    ("pixtral-", "mistral"),
    ("voxtral-", "mistral"),
    ("open-mistral-", "mistral"),
    ("open-mixtral-", "mistral"),
    ("sonar", "perplexity"),
)
_OPEN_WEIGHTS: Final = ("gpt-oss", "gemma")
_PROVIDERS: Final = tuple(dict.fromkeys(("openai", *(o for _, o in _OWNER_OF_NAME), *PROVIDER_OF_PREFIX.values())))
# Who sells batches at half price where the package has no batch price of the model. Elsewhere a batch is unpriced.
_BATCH_IS_HALF: Final = frozenset({"openai", "anthropic", "google", "mistral"})

_TOKEN_KEYS: Final[Mapping[str, str]] = {
    "input_mtok": "input",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write",
    "output_mtok": "output",
    "input_audio_mtok": "audio_input",
    "cache_audio_read_mtok": "cached_audio_input",
    "output_audio_mtok": "audio_output",
    "input_image_mtok": "image_input",
    "cache_image_read_mtok": "cached_image_input",
    "output_image_mtok": "image_output",
}
# Its key, our field, and what one of theirs is in ours.
_UNIT_KEYS: Final = (
    ("input_mchars", "per_million_characters", Decimal(1)),
    ("audio_hours", "per_minute", Decimal(60)),
    ("input_audio_hours", "per_minute", Decimal(60)),
    ("requests_kcount", "per_request", Decimal(1000)),
)
# Charges beside the model's (tool calls: not in `Usage`), and finer prices for what `Usage` counts in one. A row with
# any other key prices something that we cannot count: the model stays unpriced rather than half priced.
_IGNORED_KEYS: Final = frozenset(
    {
        "web_searches_kcount",
        "social_searches_kcount",
        "storage_searches_kcount",
        "code_executions_kcount",
        "cache_write_5m_mtok",
        "cache_write_1h_mtok",
    }
)


def _usd(**prices: str) -> Price:
    return Price(**{name: Decimal(value) for name, value in prices.items()})  # type: ignore[arg-type]  # fields by name


_FREE = _usd(input="0", output="0")

# What genai-prices 0.2.3 leaves out. It fills gaps only: a price of the package's, now or after an update, goes first.
# Written down from memory of https://platform.openai.com/docs/pricing as it stood in 2025, not read off the page on
# the day: a ModelPrice row is the cure for a figure that has changed since.
# On purpose without a price: dall-e-2 and dall-e-3 (by size and quality, which usage does not tell) and sora-2(-pro)
# (by resolution, the same); a ModelPrice row prices them, with `per_image`, and a video with `per_request`.
EXTRA: Final[Mapping[str, Price]] = {
    # Moderation is free of charge (https://platform.openai.com/docs/guides/moderation). By name: the package's row
    # takes every model with "moderation" anywhere in its name, and a name is something that a client makes up.
    "omni-moderation": _FREE,
    "omni-moderation-latest": _FREE,
    "text-moderation-latest": _FREE,
    "text-moderation-stable": _FREE,
    "text-moderation-007": _FREE,
    # Fine-tuned models: the package has no cached input for two, and has none of the others.
    "ft:gpt-4o": _usd(input="3.75", cached_input="1.875", output="15"),
    "ft:gpt-4o-mini": _usd(input="0.30", cached_input="0.15", output="1.20"),
    "ft:gpt-4.1": _usd(input="3", cached_input="0.75", output="12"),
    "ft:gpt-4.1-mini": _usd(input="0.80", cached_input="0.20", output="3.20"),
    "ft:gpt-4.1-nano": _usd(input="0.20", cached_input="0.05", output="0.80"),
    "ft:o4-mini": _usd(input="4", cached_input="1", output="16"),
    "ft:davinci-002": _usd(input="12", output="12"),
    "ft:babbage-002": _usd(input="1.6", output="1.6"),
    # Audio in chat: the package has the text prices only, a sixteenth of the audio's.
    "gpt-4o-audio-preview": _usd(input="2.50", output="10", audio_input="40", audio_output="80"),
    "gpt-4o-audio-preview-2024-10-01": _usd(input="2.50", output="10", audio_input="100", audio_output="200"),
    "gpt-4o-mini-audio-preview": _usd(input="0.15", output="0.60", audio_input="10", audio_output="20"),
}


@dataclass(frozen=True, slots=True)
class ListPrice:
    """The published price of a model. `model` is its row, not the name that was asked for.

    `valid_from` is the day from which the package knows this price, or the first of its tiers and batch prices; None
    if it is the oldest known, or changes with the hour.
    """

    model: str
    provider: str
    price: Price
    valid_from: date | None
    source: str
    is_hourly: bool = False

    @property
    def row(self) -> str:
        """The row's name among all providers': OpenAI's stand without theirs."""
        return _row(self.provider, self.model)


def list_price(model: str, at: datetime) -> ListPrice | None:
    """Return the list price of `model` at that time, or None if nobody's list has it, or more than one does."""
    return _catalogue().price(model, at)


def all_list_prices(at: datetime | None = None) -> Iterator[ListPrice]:
    """Yield every list price in force at `at` (now if left out), OpenAI's first; each model once per provider."""
    return _catalogue().prices(at or datetime.now(UTC))


def row_names(model: str, listed: ListPrice | None) -> list[str]:
    """Return under which `ListPrice.row` another list may have the price of `model`, the most exact first.

    `listed` is what `list_price` says of it. A list that has a row of the very name goes before the row that the
    package's list leads the name to; a name that leads to none is looked for without its date too.
    """
    named = _named_provider(model)
    names = [name for name in lookup_order(model) if _may_be_listed(name)]
    rows = [_row(named or _owner_of(name), name).lower() for name in names]
    if listed is None:
        return rows
    # What EXTRA says of a name of its own, it does not say of the row that the package has for it.
    has_own_price = bool(names) and names[0] in EXTRA
    return rows[:1] if has_own_price else list(dict.fromkeys((*rows[:1], listed.row.lower())))


class Catalogue:
    """The well-known providers of one set of data. Unchanging, so threads share it."""

    def __init__(self, providers: Sequence[Provider]) -> None:
        by_id = {provider.id: provider for provider in providers}
        self._providers = {name: by_id[name] for name in _PROVIDERS if name in by_id}
        self._find = lru_cache(maxsize=CACHE_SIZE)(self._search)
        # By row and entry of EXTRA, so bounded: any number of names that lead to one row share its prices.
        self._timelines: dict[tuple[str, str, str], _Timeline] = {}

    def price(self, model: str, at: datetime) -> ListPrice | None:
        timeline = self._find(model)
        return None if timeline is None else timeline.at(at)

    def prices(self, at: datetime) -> Iterator[ListPrice]:
        """Yield the price of each row at `at`, then what only EXTRA has."""
        seen = set()
        for provider_id, provider in self._providers.items():
            for row in provider.models:
                seen.add(row.id)
                if not row.id.lower().startswith(_OPEN_WEIGHTS) and (
                    found := self._timeline(provider_id, row, row.id if row.id in EXTRA else "").at(at)
                ):
                    yield found
        yield from (_own_list_price(name) for name in EXTRA if name not in seen)

    def _search(self, model: str) -> _Timeline | None:
        named = _named_provider(model)
        for name in filter(_may_be_listed, lookup_order(model)):
            provider_id = named or _owner_of(name)
            provider = self._providers.get(provider_id)
            row = provider.find_model(name) if provider is not None else None
            if row is not None and (found := self._timeline(provider_id, row, _extra_for(provider_id, name, row))):
                return found
            if provider_id == "openai" and name in EXTRA:
                return _Timeline.unchanging(_own_list_price(name))
        return None

    def _timeline(self, provider_id: str, row: ModelInfo, extra: str) -> _Timeline:
        key = (provider_id, row.id, extra)
        timeline = self._timelines.get(key)
        if timeline is None:
            timeline = self._timelines[key] = _Timeline.of(provider_id, row, extra)
        return timeline


@dataclass(frozen=True, slots=True)
class _Timeline:
    """A model's prices by the day (UTC, as ordinal) and the second of the day at which they change."""

    days: tuple[int, ...]
    seconds: tuple[int, ...]
    prices: tuple[tuple[ListPrice | None, ...], ...]

    def __bool__(self) -> bool:
        return any(price is not None for row in self.prices for price in row)

    @classmethod
    def unchanging(cls, price: ListPrice) -> _Timeline:
        return cls((), (), ((price,),))

    @classmethod
    def of(cls, provider_id: str, row: ModelInfo, extra: str) -> _Timeline:
        days, seconds = _changes(row)
        first_day = date.fromordinal(days[0]) - timedelta(days=1) if days else date(2020, 1, 1)
        prices = []
        for day in (first_day, *map(date.fromordinal, days)):
            moments = [datetime.combine(day, time(tzinfo=UTC)) + timedelta(seconds=s) for s in (0, *seconds)]
            valid_from = None if day is first_day or seconds else day
            prices.append(
                tuple(_list_price(provider_id, row, extra, at, valid_from, is_hourly=bool(seconds)) for at in moments)
            )
        return cls(days, seconds, tuple(prices))

    def at(self, when: datetime) -> ListPrice | None:
        """Return the price at `when`; without a time zone it is UTC."""
        if not self.days and not self.seconds:
            return self.prices[0][0]
        if when.tzinfo is not None and when.tzinfo is not UTC:
            when = when.astimezone(UTC)
        day = bisect_right(self.days, when.toordinal())
        second = bisect_right(self.seconds, when.hour * 3600 + when.minute * 60 + when.second)
        return self.prices[day][second]


@cache
def _catalogue() -> Catalogue:
    # Read at the first price that is asked for: up to a second of work, which a process without prices never does.
    return Catalogue(get_snapshot().providers)


def _named_provider(model: str) -> str | None:
    """Return the provider that stands before the name, as in `openai/gpt-4o`."""
    prefix, slash, _ = model.strip().lower().partition("/")
    return PROVIDER_OF_PREFIX.get(prefix) if slash else None


def _may_be_listed(name: str) -> bool:
    # A "/" that is left belongs to somebody else's name: models are found by their beginnings.
    return "/" not in name and name == name.lower() and not name.startswith(_OPEN_WEIGHTS)


def _row(provider: str, model: str) -> str:
    return model if provider == "openai" else f"{provider}/{model}"


def _owner_of(name: str) -> str:
    return next((owner for beginning, owner in _OWNER_OF_NAME if name.startswith(beginning)), "openai")


def _extra_for(provider_id: str, name: str, row: ModelInfo) -> str:
    """Return the name of the entry of EXTRA that fills this row's gaps, or ""."""
    if provider_id != "openai":
        return ""
    return name if name in EXTRA else row.id if row.id in EXTRA else ""


def _own_list_price(name: str) -> ListPrice:
    return ListPrice(model=name, provider="openai", price=EXTRA[name], valid_from=None, source=OWN_TABLE)


def _list_price(
    provider_id: str, row: ModelInfo, extra: str, at: datetime, valid_from: date | None, *, is_hourly: bool
) -> ListPrice | None:
    """Return one row as it stood at `at`, its gaps filled from EXTRA; None if it prices nothing that we can count."""
    standard = _price_of(provider_id, row.id, row.get_prices(at))
    if standard is None:
        return None
    own = EXTRA[extra] if extra else Price()
    tiers: dict[str, Decimal | Price] = {}
    batch = None
    for variant in row.price_variants or ():
        if not _is_active(variant, at) or variant.when.get("service_tier") == "default":
            continue
        if (price := _price_of(provider_id, row.id, row.get_prices(at, variant.when))) is None:
            continue
        if variant.when.keys() == {"service_tier"}:
            tiers[variant.when["service_tier"]] = _filled(price, own)
        elif variant.when == {"processing": "batch"}:
            batch = _filled(price, own)
    filled = _filled(standard, own)
    return ListPrice(
        model=row.id,
        provider=provider_id,
        price=replace(
            filled,
            batch=batch,
            batch_factor=filled.batch_factor if provider_id in _BATCH_IS_HALF else None,
            service_tiers=tiers,
        ),
        valid_from=valid_from,
        source=PACKAGE_VERSION if filled == standard else f"{PACKAGE_VERSION} and {OWN_TABLE}",
        is_hourly=is_hourly,
    )


def _is_active(variant: PriceVariant, at: datetime) -> bool:
    return variant.constraint is None or variant.constraint.active(at)


def _filled(price: Price, own: Price) -> Price:
    """Return `price` with the prices it lacks taken from `own`."""
    gaps = [name for name in (*TOKEN_PRICES, *UNIT_PRICES) if getattr(price, name) is None]
    return replace(price, **{name: getattr(own, name) for name in gaps})


def _price_of(provider_id: str, model: str, prices: ModelPrice) -> Price | None:
    """Return a row of the package as our `Price`, without tiers and batch; None if it is empty, all 0 or beyond us."""
    row: dict[str, Decimal | TieredPrices] = {key: value for key, value in vars(prices).items() if value is not None}
    if row.keys() - _TOKEN_KEYS.keys() - {key for key, _, _ in _UNIT_KEYS} - _IGNORED_KEYS:
        return None
    _name_the_kind(provider_id, model, row)
    values: dict[str, Decimal] = {}
    steps: dict[int, dict[str, Decimal]] = {}
    for key, name in _TOKEN_KEYS.items():
        value = row.get(key)
        if isinstance(value, TieredPrices):
            values[name] = value.base
            for tier in value.tiers:
                steps.setdefault(tier.start, {})[name] = tier.price
        elif value is not None:
            values[name] = value
    for key, name, theirs_in_ours in _UNIT_KEYS:
        value = row.get(key)
        if isinstance(value, TieredPrices):
            return None
        if value is not None:
            values[name] = max(value / theirs_in_ours, values.get(name, Decimal(0)))
    if not any(values.values()):
        return None
    return Price(**values, long_context=_cumulative(steps))  # type: ignore[arg-type]  # fields by name


def _name_the_kind(provider_id: str, model: str, row: dict[str, Decimal | TieredPrices]) -> None:
    """Say of prices that stand under the plain names what they are the price of, where the makers' pages do.

    The one output price of gpt-image-1 is its images', that of a text-to-speech model its audio's; Google's one input
    price is that of text, image and audio, unless there is one of audio.
    """
    output, prompt = row.get("output_mtok"), row.get("input_mtok")
    if output is not None and provider_id == "openai" and model.startswith(("gpt-image", "chatgpt-image")):
        row.setdefault("output_image_mtok", output)
    if output is not None and "-tts" in model:
        row.setdefault("output_audio_mtok", output)
    if prompt is not None and provider_id == "google":
        row.setdefault("input_audio_mtok", prompt)


def _cumulative(steps: dict[int, dict[str, Decimal]]) -> tuple[LongContext, ...]:
    """Return thresholds that each name every price in force beyond them: only the highest one passed is looked at."""
    overrides: dict[str, Decimal] = {}
    result = []
    for threshold in sorted(steps):
        overrides = {**overrides, **steps[threshold]}
        result.append(LongContext(above_input_tokens=threshold, overrides=overrides))
    return tuple(result)


def _changes(row: ModelInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the days (as ordinals) and the seconds of the day, in UTC, at which a price of this row changes."""
    constraints = [variant.constraint for variant in row.price_variants or ()]
    if isinstance(row.prices, list):
        constraints += [conditional.constraint for conditional in row.prices]
    days = {c.start_date.toordinal() for c in constraints if isinstance(c, StartDateConstraint)}
    times = {t for c in constraints if isinstance(c, TimeOfDateConstraint) for t in (c.start_time, c.end_time)}
    return tuple(sorted(days)), tuple(sorted({_second_of_day(moment) for moment in times} - {0}))


def _second_of_day(moment: time) -> int:
    if moment.tzinfo is not None:
        moment = datetime.combine(date(2020, 1, 1), moment).astimezone(UTC).time()
    return moment.hour * 3600 + moment.minute * 60 + moment.second
