"""Costs: the worked examples, and what must hold of every price and every usage."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import astuple

from billing.events import Usage
from billing.fields import usd_to_units
from billing.list_prices import list_price
from billing.pricing import (
    FALLBACKS,
    MAX_COST_USD,
    MAX_MODEL_LENGTH,
    MAX_QUANTITY,
    TOKEN_PRICES,
    UNIT_PRICES,
    LongContext,
    Price,
    Tariff,
    cost_of,
    lookup_order,
)
from billing.tests.price_examples import EXAMPLES, Example

D = Decimal
UNIT = D("0.0000001")
TOKENS = [f"{name}_tokens" for name in TOKEN_PRICES]

amounts = st.decimals(min_value=0, max_value=1000, places=6)
counts = st.integers(min_value=0, max_value=10_000_000)
token_usages = st.builds(Usage, **{name: counts for name in TOKENS})  # type: ignore[arg-type]
full_prices = st.builds(Price, **{name: amounts for name in TOKEN_PRICES})
factors = st.decimals(min_value=0, max_value=10, places=4)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.about)
def test_a_worked_example_costs_what_was_computed_by_hand(case: Example) -> None:
    found = list_price(case.model, case.at)
    costing = cost_of(
        case.usage,
        found.price if found else None,
        is_batch=case.is_batch,
        service_tier=case.service_tier,
        factor=D(case.factor),
    )
    assert costing.amount_usd == (None if case.expected is None else D(case.expected))
    assert costing.is_priced is (case.expected is not None)
    assert bool(costing.missing) is (case.expected is None)


def test_there_are_at_least_thirty_examples_with_a_price() -> None:
    assert sum(case.expected is not None for case in EXAMPLES) >= 30
    assert len({case.about for case in EXAMPLES}) == len(EXAMPLES)


# --- what is missing ---


def test_no_price_is_unpriced_even_for_no_usage() -> None:
    costing = cost_of(Usage(), None)
    assert (costing.amount_usd, costing.missing) == (None, ("price",))


def test_an_unpriced_request_says_for_want_of_what() -> None:
    usage = Usage(input_tokens=1, audio_input_tokens=1, audio_output_tokens=1)
    costing = cost_of(usage, Price(input=D(1), output=D(1)))
    assert costing.missing == ("audio_input_tokens", "audio_output_tokens")
    assert costing.parts == {}


@pytest.mark.parametrize("name", TOKENS)
def test_a_kind_of_token_without_price_and_fallback_is_never_free(name: str) -> None:
    priced_by = set(FALLBACKS[name.removesuffix("_tokens")])
    price = Price(**{other: D(1) for other in TOKEN_PRICES if other not in priced_by})  # type: ignore[arg-type]
    assert cost_of(Usage(**{name: 1}), price).missing == (name,)


@pytest.mark.parametrize(
    ("usage", "price", "missing"),
    [
        (Usage(images=1), Price(input=D(1), output=D(1)), ("images",)),
        (Usage(images=1, input_tokens=9), Price(input=D(1), output=D(1)), ("images",)),
        (Usage(characters=9, input_tokens=9), Price(input=D(1), audio_output=D(1)), ("characters",)),
        (Usage(seconds=9, output_tokens=9), Price(input=D(1), output=D(1)), ("seconds",)),
        (Usage(input_tokens=9), Price(per_minute=D(1)), ("input_tokens",)),
        (Usage(input_tokens=9, characters=9), Price(per_minute=D(1)), ("input_tokens", "characters")),
        (Usage(input_tokens=9), Price(), ("input_tokens",)),
    ],
)
def test_work_is_unpriced_if_neither_its_unit_nor_its_tokens_are_paid(
    usage: Usage, price: Price, missing: tuple[str, ...]
) -> None:
    assert cost_of(usage, price).missing == missing


def test_a_unit_whose_tokens_are_paid_is_only_a_description() -> None:
    price = Price(input=D(1), output=D(2), audio_input=D(3))
    assert cost_of(Usage(images=1, output_tokens=10), price).amount_usd == D("0.00002")
    assert cost_of(Usage(seconds=5, audio_input_tokens=10), price).amount_usd == D("0.00003")


def test_prices_of_tokens_and_units_add_up() -> None:
    price = Price(input=D(1), per_image=D("0.04"), per_request=D("0.01"))
    costing = cost_of(Usage(input_tokens=1_000_000, images=2), price)
    assert costing.parts == {"input_tokens": D(1), "images": D("0.08"), "requests": D("0.01")}
    assert costing.amount_usd == D("1.09")


def test_a_price_for_each_request_is_not_charged_for_a_refused_one() -> None:
    price = Price(per_request=D("0.04"))
    assert cost_of(Usage(images=1), price).amount_usd == D("0.04")
    assert cost_of(Usage(), price, requests=0).amount_usd == 0


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_seconds_that_cannot_be_are_unpriced(seconds: float) -> None:
    assert cost_of(Usage(seconds=seconds), Price(per_minute=D(1))).missing == ("seconds",)


@pytest.mark.parametrize("tokens", [-1, MAX_QUANTITY + 1, 10**400])
def test_counts_that_cannot_be_are_unpriced(tokens: int) -> None:
    assert cost_of(Usage(input_tokens=tokens), Price(input=D(1))).missing == ("input_tokens",)


def test_the_largest_bill_is_still_exact() -> None:
    price = Price(input=D("99.999999"), output=D("0.000001"))
    usage = Usage(input_tokens=MAX_QUANTITY, output_tokens=100_000)
    assert cost_of(usage, price).amount_usd == D("99999999.0000001")
    assert Tariff(price).units_of(usage) == 999_999_990_000_001


@pytest.mark.parametrize("rate", ["100.000001", "999999999.999999"])
def test_what_costs_more_than_can_be_summed_up_costs_the_most_there_is(rate: str) -> None:
    usage, price = Usage(input_tokens=MAX_QUANTITY), Price(input=D(rate))
    assert cost_of(usage, price).amount_usd == MAX_COST_USD
    assert Tariff(price).units_of(usage) == 10**15
    assert Tariff(price).units_of_text(usage, (MAX_QUANTITY, 0, 0, 0, 0)) == 10**15


def test_seconds_are_the_decimal_that_was_written() -> None:
    assert cost_of(Usage(seconds=0.1), Price(per_minute=D(60))).parts == {"seconds": D("0.1")}


# --- batch and tiers ---


def test_batch_has_its_own_price_list_or_a_factor_or_none() -> None:
    usage = Usage(input_tokens=1_000_000)
    assert cost_of(usage, Price(input=D(2)), is_batch=True).amount_usd == 1
    assert cost_of(usage, Price(input=D(2), batch=Price(input=D("1.5"))), is_batch=True).amount_usd == D("1.5")
    assert cost_of(usage, Price(input=D(2), batch_factor=None), is_batch=True).missing == ("batch",)


def test_a_tier_is_a_factor_or_a_price_list() -> None:
    usage = Usage(input_tokens=1_000_000)
    price = Price(input=D(2), service_tiers={"priority": D("1.75"), "flex": Price(input=D("0.9"))})
    assert cost_of(usage, price, service_tier="priority").amount_usd == D("3.5")
    assert cost_of(usage, price, service_tier="Flex ").amount_usd == D("0.9")
    assert cost_of(usage, price, service_tier="scale").amount_usd == 2
    assert cost_of(usage, price, service_tier="turbo").missing == ("service_tier",)


def test_a_batch_has_only_one_tier() -> None:
    price = Price(input=D(2), service_tiers={"priority": D(2)})
    usage = Usage(input_tokens=1_000_000)
    assert cost_of(usage, price, is_batch=True, service_tier="priority").amount_usd == 1


def test_the_highest_threshold_passed_prices_every_token() -> None:
    steps = (LongContext(200, {"input": D(4), "output": D(40)}), LongContext(100, {"input": D(2)}))
    price = Price(input=D(1), output=D(10), long_context=steps)
    costs = [cost_of(Usage(input_tokens=n * 10, output_tokens=1), price).amount_usd for n in (10, 11, 21)]
    assert costs == [D("0.00011"), D("0.00023"), D("0.00088")]


# --- exactness ---


@given(token_usages, full_prices, factors)
def test_the_cost_is_the_sum_of_its_buckets(usage: Usage, price: Price, factor: Decimal) -> None:
    whole = cost_of(usage, price, factor=factor)
    alone = [cost_of(Usage(**{name: getattr(usage, name)}), price, factor=factor).parts for name in TOKENS]
    assert whole.parts == {name: part for parts in alone for name, part in parts.items()}


@given(token_usages, full_prices, st.sampled_from(TOKENS), counts)
def test_more_use_never_costs_less(usage: Usage, price: Price, name: str, more: int) -> None:
    counted = {field: getattr(usage, field) for field in TOKENS}
    larger = Usage(**counted | {name: counted[name] + more})  # type: ignore[arg-type]
    before, after = cost_of(usage, price).amount_usd, cost_of(larger, price).amount_usd
    assert before is not None
    assert after is not None
    assert after >= before


@given(counts, counts, amounts, amounts)
def test_a_cached_token_is_charged_once_and_at_the_cache_price(
    fresh: int, cached: int, full: Decimal, low: Decimal
) -> None:
    costing = cost_of(Usage(input_tokens=fresh, cached_input_tokens=cached), Price(input=full, cached_input=low))
    assert sum(costing.parts.values()) * 1_000_000 == fresh * full + cached * low


@given(token_usages, st.integers(0, 10_000_000))
def test_reasoning_changes_no_bill(usage: Usage, reasoning: int) -> None:
    price = Price(**{name: D(7) for name in TOKEN_PRICES})  # type: ignore[arg-type]
    counted = {field: getattr(usage, field) for field in TOKENS}
    assert cost_of(Usage(**counted, reasoning_tokens=reasoning), price) == cost_of(usage, price)


@given(token_usages, full_prices, factors, st.booleans())
def test_rounding_moves_the_total_by_half_a_unit_at_most(
    usage: Usage, price: Price, factor: Decimal, is_batch: bool
) -> None:
    costing = cost_of(usage, price, factor=factor, is_batch=is_batch)
    assert costing.amount_usd is not None
    assert abs(costing.amount_usd - sum(costing.parts.values(), D(0))) <= UNIT / 2
    assert costing.amount_usd.as_tuple().exponent == -7


@given(token_usages, full_prices, st.floats(0, 1e9), st.integers(0, 10**9))
def test_every_amount_is_a_decimal(usage: Usage, price: Price, seconds: float, characters: int) -> None:
    counted = {field: getattr(usage, field) for field in TOKENS}
    priced = Price(
        **{name: getattr(price, name) for name in TOKEN_PRICES}, per_minute=D("0.006"), per_million_characters=D(15)
    )
    costing = cost_of(Usage(**counted, seconds=seconds, characters=characters), priced)
    assert isinstance(costing.amount_usd, D)
    assert all(isinstance(part, D) for part in costing.parts.values())


gaps = st.none() | amounts
plain_prices = st.builds(Price, **{name: gaps for name in (*TOKEN_PRICES, *UNIT_PRICES)})  # type: ignore[arg-type]
any_prices = st.builds(
    Price,
    **{name: gaps for name in (*TOKEN_PRICES, *UNIT_PRICES)},  # type: ignore[arg-type]
    long_context=st.lists(
        st.builds(LongContext, st.integers(0, 1000), st.dictionaries(st.sampled_from(TOKEN_PRICES), amounts)),
        max_size=2,
    ).map(tuple),
    batch=st.none() | plain_prices,
    batch_factor=st.none() | factors,
    service_tiers=st.dictionaries(st.sampled_from(["flex", "priority"]), factors | plain_prices, max_size=2),
)
few = st.sampled_from([0, 0, 0, 1, 3, 500, 12_345, MAX_QUANTITY, MAX_QUANTITY + 1, -1])
any_usages = st.builds(
    Usage,
    **{name: few for name in Usage.__struct_fields__ if name != "seconds"},  # type: ignore[arg-type]
    seconds=st.sampled_from([0.0, 0.0, 1.5, -1.0, float("nan"), float("inf")]),
)


@examples(max_examples=500)
@given(
    st.lists(any_usages | token_usages, min_size=1, max_size=4),
    full_prices | any_prices,
    factors,
    st.booleans(),
    st.sampled_from(["", "auto", "Flex ", "priority", "batch", "turbo"]),
    st.integers(0, 1),
)
def test_a_tariff_costs_to_the_last_unit_what_the_price_does(
    usages: list[Usage], price: Price, factor: Decimal, is_batch: bool, tier: str, requests: int
) -> None:
    tariff = Tariff(price, factor=factor, is_batch=is_batch, service_tier=tier, requests=requests)
    for usage in usages:
        amount = cost_of(
            usage, price, factor=factor, is_batch=is_batch, service_tier=tier, requests=requests
        ).amount_usd
        units = None if amount is None else usd_to_units(amount)
        assert tariff.units_of(usage) == units
        text = astuple(usage)[:5]
        if not any(astuple(usage)[5:]):
            assert tariff.units_of_text(usage, text) == units


def test_a_tariff_rounds_half_a_unit_up() -> None:
    tariff = Tariff(Price(input=D("0.05")))
    assert [tariff.units_of(Usage(input_tokens=tokens)) for tokens in (1, 2, 3)] == [1, 1, 2]


@pytest.mark.parametrize("amount", [0.5, 1, "1", D("-1"), D("NaN"), D("Infinity"), D("1e10")])
def test_only_a_decimal_from_zero_is_a_price(amount: object) -> None:
    with pytest.raises(ValueError, match="input"):
        Price(input=amount)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor"):
        cost_of(Usage(), Price(), factor=amount)  # type: ignore[arg-type]


def test_a_tier_and_a_threshold_are_checked_too() -> None:
    with pytest.raises(ValueError, match="flex"):
        Price(service_tiers={"flex": 0.5})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="per_minute"):
        LongContext(1, {"per_minute": D(1)})
    with pytest.raises(ValueError, match="negative"):
        LongContext(-1, {})


# --- names ---


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("gpt-4o", ["gpt-4o"]),
        ("gpt-4o-2024-08-06", ["gpt-4o-2024-08-06", "gpt-4o"]),
        (" GPT-4o ", ["GPT-4o", "gpt-4o"]),
        ("openai/gpt-4o-2024-08-06", ["openai/gpt-4o-2024-08-06", "gpt-4o-2024-08-06", "openai/gpt-4o", "gpt-4o"]),
        ("models/gemini-2.5-pro", ["models/gemini-2.5-pro", "gemini-2.5-pro"]),
        ("acme/gpt-4o", ["acme/gpt-4o"]),
        ("openai/", ["openai/"]),
        ("gpt-4-0613", ["gpt-4-0613", "gpt-4"]),
        ("gpt-4-1106-preview", ["gpt-4-1106-preview"]),
        ("mistral-large-2402", ["mistral-large-2402"]),
        ("claude-sonnet-4-20250514", ["claude-sonnet-4-20250514"]),
        (
            "ft:gpt-4o-mini-2024-07-18:org::id",
            ["ft:gpt-4o-mini-2024-07-18:org::id", "ft:gpt-4o-mini-2024-07-18", "ft:gpt-4o-mini"],
        ),
        (
            "ft:gpt-3.5-turbo-0125:org:name:id",
            ["ft:gpt-3.5-turbo-0125:org:name:id", "ft:gpt-3.5-turbo-0125", "ft:gpt-3.5-turbo"],
        ),
        ("", []),
        ("gpt-4o\n", ["gpt-4o"]),
        ("gpt\x004o", []),
        ("x" * (MAX_MODEL_LENGTH + 1), []),
    ],
)
def test_a_price_is_looked_for_under_these_names(model: str, names: list[str]) -> None:
    assert lookup_order(model) == names


@given(st.text(max_size=300))
def test_any_text_has_a_short_list_of_names_and_the_text_is_the_first(model: str) -> None:
    names = lookup_order(model)
    assert len(names) == len(set(names)) <= 12
    assert not names or names[0] == model.strip()
    assert not any(
        name.startswith("ft:") != names[0].lower().startswith("ft:") for name in names if "/" not in names[0]
    )
