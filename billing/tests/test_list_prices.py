"""List prices: which name leads to which price, and that a refresh can do no harm."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import genai_prices
import pytest
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import TieredPrices

from billing.events import Usage
from billing.list_prices import (
    CACHE_SIZE,
    EXTRA,
    OWN_TABLE,
    PACKAGE_VERSION,
    Catalogue,
    all_list_prices,
    list_price,
)
from billing.pricing import MAX_MODEL_LENGTH, cost_of
from billing.tests.price_examples import AT

D = Decimal
LISTED = list(all_list_prices(AT))


# --- against the package's own arithmetic ---

TOKENS_SOLD = [found for found in LISTED if found.price.input and found.price.output and found.source != OWN_TABLE]


def test_most_of_the_package_is_compared() -> None:
    assert len(TOKENS_SOLD) > 250


@pytest.mark.parametrize(
    "context", [None, {"processing": "batch"}, {"service_tier": "flex"}, {"service_tier": "priority"}]
)
@pytest.mark.parametrize("fresh", [700, 300_000])
def test_every_row_costs_what_the_package_itself_computes(context: dict[str, str] | None, fresh: int) -> None:
    usage = Usage(input_tokens=fresh, output_tokens=200)
    theirs = genai_prices.Usage(input_tokens=fresh, output_tokens=200)
    for found in TOKENS_SOLD:
        tier = (context or {}).get("service_tier", "")
        is_batch = context is not None and not tier
        if (is_batch and found.price.batch is None) or (tier and tier not in found.price.service_tiers):
            continue
        ours = cost_of(usage, found.price, is_batch=is_batch, service_tier=tier)
        row = next(
            m for p in get_snapshot().providers if p.id == found.provider for m in p.models if m.id == found.model
        )
        expected = row.get_prices(AT, context).calc_price(theirs)["total_price"]
        assert sum(ours.parts.values()) == expected, (found.provider, found.model)


def test_cached_tokens_cost_what_the_package_computes() -> None:
    ours_usage = Usage(input_tokens=700, cached_input_tokens=300, output_tokens=200)
    theirs = genai_prices.Usage(input_tokens=1000, cache_read_tokens=300, output_tokens=200)
    for found in TOKENS_SOLD:
        row = next(
            m for p in get_snapshot().providers if p.id == found.provider for m in p.models if m.id == found.model
        )
        if found.source != PACKAGE_VERSION:
            continue
        ours = cost_of(ours_usage, found.price)
        expected = row.get_prices(AT).calc_price(theirs)["total_price"]
        assert sum(ours.parts.values()) == expected, (found.provider, found.model)


# --- names ---


@pytest.mark.parametrize(
    ("model", "provider", "row"),
    [
        ("gpt-4o", "openai", "gpt-4o"),
        ("azure/gpt-4o", "openai", "gpt-4o"),
        ("ft:gpt-3.5-turbo-0125:acme::x", "openai", "ft:gpt-3.5-turbo-"),
        ("deepseek-chat", "deepseek", "deepseek-chat"),
        ("claude-opus-4-5", "anthropic", "claude-opus-4-5"),
        ("google/gemini-2.5-pro", "google", "gemini-2.5-pro"),
        ("x-ai/grok-4", "x-ai", "grok-4-0709"),
        ("kimi-k3", "moonshotai", "kimi-k3"),
        ("mistral-large-latest", "mistral", "mistral-large"),
        ("zai/glm-5", "zai", "GLM-5"),
    ],
)
def test_a_name_is_on_the_list_of_its_maker(model: str, provider: str, row: str) -> None:
    found = list_price(model, AT)
    assert found is not None
    assert (found.provider, found.model) == (provider, row)


@pytest.mark.parametrize(
    "model",
    [
        "",
        "gpt-nine",
        "acme/gpt-4o",
        "evil/claude-opus-4-5",
        "my-gemini-2.5-pro",
        "glm-5",  # two lists, two prices
        "qwen3-max",  # resellers only
        "gpt-oss-120b",
        "openai/gpt-oss-120b",
        "gemma-3",
        "mistral-ocr-latest",  # by the page
        "dall-e-3",
        "sora-2",
        "my-moderation-model",
        "ft:o3-2025-04-16:acme::x",
        "deepseek/gpt-4o",
    ],
)
def test_a_name_that_is_unknown_or_ambiguous_has_no_price(model: str) -> None:
    assert list_price(model, AT) is None


def test_every_row_of_ours_is_found_under_its_name() -> None:
    for name, own in EXTRA.items():
        found = list_price(name, AT)
        assert found is not None
        assert OWN_TABLE in found.source
        for field in ("input", "cached_input", "output", "audio_input", "audio_output"):
            assert getattr(own, field) is None or getattr(found.price, field) == getattr(own, field), name


def test_the_package_goes_before_our_table() -> None:
    found = list_price("ft:gpt-4o-2024-08-06:acme::x", AT)
    assert found is not None
    assert found.source == f"{PACKAGE_VERSION} and {OWN_TABLE}"
    assert (found.price.input, found.price.cached_input) == (D("3.75"), D("1.875"))


def test_a_snapshot_with_its_own_row_of_ours_does_not_take_the_familys() -> None:
    old, new = (list_price(f"gpt-4o-audio-preview-{day}", AT) for day in ("2024-10-01", "2024-12-17"))
    assert old is not None
    assert new is not None
    assert (old.price.audio_input, new.price.audio_input) == (D(100), D(40))


# --- dates ---


def test_a_price_is_that_of_its_day() -> None:
    cut = datetime(2026, 7, 30, tzinfo=UTC)
    before, after = (list_price("gpt-5.6-luna", at) for at in (cut - timedelta(seconds=1), cut))
    assert before is not None
    assert after is not None
    assert (before.price.input, after.price.input) == (D(1), D("0.2"))
    assert after.valid_from == date(2026, 7, 30)


def test_a_moment_counts_whatever_its_time_zone() -> None:
    beijing = datetime(2026, 7, 30, 7, 59, tzinfo=timezone(timedelta(hours=8)))
    found = list_price("gpt-5.6-luna", beijing)
    assert found is not None
    assert found.price.input == 1
    assert list_price("gpt-5.6-luna", datetime(2026, 7, 30)) == list_price(
        "gpt-5.6-luna", datetime(2026, 7, 30, tzinfo=UTC)
    )


def test_prices_agree_with_the_package_at_every_hour_and_around_every_date() -> None:
    days = [datetime(2024, 1, 1, tzinfo=UTC), *(datetime(2026, month, 1, tzinfo=UTC) for month in range(1, 13))]
    days += [datetime(2026, 10, day, tzinfo=UTC) for day in range(9, 21)]
    moments = [day + timedelta(minutes=minutes) for day in days for minutes in range(0, 1440, 90)]
    for provider in get_snapshot().providers:
        if provider.id not in ("deepseek", "openai"):
            continue
        for row in provider.models:
            if isinstance(row.prices, list):
                for at in moments:
                    found = list_price(f"{provider.id}/{row.id}", at)
                    raw: Any = row.get_prices(at).input_mtok
                    assert found is not None
                    assert found.price.input == (raw.base if isinstance(raw, TieredPrices) else raw), (row.id, at)


# --- what a client's made-up names can do ---


def test_made_up_names_are_remembered_up_to_a_limit() -> None:
    catalogue = Catalogue(get_snapshot().providers)
    for number in range(CACHE_SIZE + 50):
        catalogue.price(f"gpt-5-nano-{number}", AT)
    assert catalogue._find.cache_info().currsize == CACHE_SIZE
    assert len(catalogue._timelines) == 1


def test_a_known_name_is_looked_up_once() -> None:
    catalogue = Catalogue(get_snapshot().providers)
    for minute in range(10):
        catalogue.price("gpt-4o", AT + timedelta(minutes=minute))
    assert catalogue._find.cache_info().misses == 1


@pytest.mark.parametrize(
    "model", ["x" * (MAX_MODEL_LENGTH + 1), "gpt-4o\x00", "a/" * 90, "ft:" * 60, "-2024-01-01" * 18]
)
def test_a_hostile_name_is_unknown(model: str) -> None:
    assert list_price(model, AT) is None


# --- the whole list ---


def test_the_list_holds_each_model_once_and_nothing_free_but_moderation() -> None:
    assert len({(found.provider, found.model) for found in LISTED}) == len(LISTED)
    assert sum(found.provider == "openai" for found in LISTED) > 100
    assert LISTED[0].provider == "openai"
    for found in LISTED:
        assert not found.price.is_empty
        if "moderation" not in found.model:
            assert any(getattr(found.price, name) for name in ("input", "per_minute", "per_million_characters")), found


def test_the_list_now_is_the_default() -> None:
    assert {found.model for found in all_list_prices()} >= {"gpt-4o", "whisper-1", "omni-moderation-latest"}
