"""The ledger says what the upstream itself counted: to the token and to the tenth of a micro-dollar, over 10,000
requests of every kind, of which one in twenty is hung up on and one in twenty cut.
"""

from __future__ import annotations

from collections import Counter
from decimal import ROUND_HALF_UP, Decimal

import pytest

from gateway.tests.exact_plans import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    KEYS,
    RESPONSES,
    WRONG_KEY,
    Buckets,
    Fate,
    Key,
    Plan,
    plans,
)
from gateway.tests.exact_run import DEFAULT_GRANT_USD, SANDBOX_KEY, Record, Run, Told, carry_out

REQUESTS = 5_000  # through one worker, and as many through two
THROUGH_SDK = 600
SANDBOX_REQUESTS = 120
# Beside the words of a prompt: what a message costs, or the JSON around it where its tokens are guessed.
MOST_AROUND_A_PROMPT = 80
SANDBOX_RATES = {
    "gpt-4o-mini": (Decimal("0.15"), Decimal("0.60")),
    "gpt-3.5-turbo-instruct": (Decimal("1.50"), Decimal(2)),
    "text-embedding-3-small": (Decimal("0.02"), Decimal(0)),
}
CENT = Decimal("0.01")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def run(request: pytest.FixtureRequest) -> Run:
    planned = list(plans(REQUESTS, through_sdk=THROUGH_SDK, seed=request.param))
    return carry_out(planned, sandbox_requests=SANDBOX_REQUESTS, workers=request.param)


@pytest.fixture(scope="module")
def by_plan(run: Run) -> list[tuple[Plan, Record]]:
    """Each plan with its record."""
    records = {record.name: record for record in run.records}
    return [(plan, records[_name(plan)]) for plan in run.plans]


def _name(plan: Plan) -> str:
    return plan.asked_model if plan.fate.has_no_head else plan.request_id


def test_the_run_holds_what_it_promises(run: Run) -> None:
    fates = Counter(plan.fate for plan in run.plans)
    assert set(fates) == set(Fate)
    hang_ups = sum(count for fate, count in fates.items() if fate.name.startswith("CLIENT"))
    cuts = sum(count for fate, count in fates.items() if fate.name.startswith("UPSTREAM"))
    assert min(hang_ups, cuts) > REQUESTS * 0.045
    assert {plan.route for plan in run.plans} == {CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS}
    assert run.upstream.spliced > REQUESTS / 20


def test_every_request_reached_the_upstream_once_as_its_client_wrote_it(run: Run) -> None:
    assert run.upstream.asked == Counter(range(REQUESTS))
    assert run.upstream.problems == []


def test_every_client_saw_what_the_upstream_sent(run: Run) -> None:
    wrong = [(plan, run.seen[plan.number]) for plan in run.plans if not _saw_its_answer(plan, run)]
    assert wrong == []


def test_every_request_has_exactly_one_record(run: Run) -> None:
    names = Counter(record.name for record in run.records if record.fingerprint != run.fingerprints[SANDBOX_KEY])
    assert names == Counter(_name(plan) for plan in run.plans)
    assert run.records_after_the_end == REQUESTS + SANDBOX_REQUESTS


def test_every_record_is_that_of_its_request(run: Run, by_plan: list[tuple[Plan, Record]]) -> None:
    for plan, record in by_plan:
        fingerprint = None if plan.key is WRONG_KEY else run.fingerprints[plan.key]
        assert record.fingerprint == fingerprint, plan
        assert (record.endpoint, record.is_stream) == (f"/v1/{plan.route}", plan.streams), plan
        if plan.number in run.upstream.tiers:
            assert (record.model, record.tier) == (plan.model.answers_as, run.upstream.tiers[plan.number]), plan
        else:
            assert record.model == plan.asked_model, plan


def test_every_ending_is_recorded_as_what_it_was(by_plan: list[tuple[Plan, Record]]) -> None:
    assert [(plan, record) for plan, record in by_plan if (record.status, record.outcome) != _ending(plan)] == []


def test_tokens_are_those_that_the_upstream_counted(run: Run, by_plan: list[tuple[Plan, Record]]) -> None:
    told = run.upstream.told
    reported = [(plan, record) for plan, record in by_plan if record.source == "upstream"]
    assert {plan.number for plan, _ in reported} == told.keys()
    assert [(plan, record) for plan, record in reported if record.buckets != told[plan.number]] == []


def test_what_nobody_counted_is_estimated_by_what_passed(run: Run, by_plan: list[tuple[Plan, Record]]) -> None:
    untold = [(plan, record) for plan, record in by_plan if plan.number not in run.upstream.told]
    assert len(untold) > REQUESTS * 0.06
    for plan, record in untold:
        if plan.fate in (Fate.REFUSED, Fate.WRONG_KEY, Fate.UPSTREAM_BEFORE_HEAD):
            assert (record.source, record.buckets) == ("none", Buckets()), plan
            continue
        assert record.source == "estimated", plan
        assert record.buckets == Buckets(input=record.buckets.input, output=run.upstream.words[plan.number]), plan
        assert plan.prompt_words <= record.buckets.input <= plan.prompt_words + MOST_AROUND_A_PROMPT, plan


def test_every_request_costs_what_its_price_says(by_plan: list[tuple[Plan, Record]]) -> None:
    for plan, record in by_plan:
        is_served = record.status == 200
        factor = plan.key.factor
        if record.source == "none":
            assert (record.cost, record.pricing) == (0, "free"), plan
            continue
        cost = plan.model.cost(record.buckets, tier=record.tier, factor=factor, is_served=is_served)
        assert (record.cost, record.pricing) == (cost, "unpriced" if cost is None else "priced"), plan


@pytest.mark.parametrize("name", ["usage by day", "keys by day", "usage by hour"])
def test_roll_ups_are_the_sums_of_the_records(run: Run, name: str) -> None:
    rolled_up, of_records = run.roll_ups[name]
    assert rolled_up == of_records


@pytest.mark.parametrize("key", [*KEYS, SANDBOX_KEY], ids=lambda key: key.api_key[:11])
def test_the_balance_is_what_was_granted_minus_what_was_used(run: Run, key: Key) -> None:
    granted = key.granted + 1 + DEFAULT_GRANT_USD
    total, used = (amount.quantize(CENT, ROUND_HALF_UP) for amount in (granted, run.spent(key)))
    assert run.balances[key] == {"total": total, "balance": total - used, "used": used}


@pytest.mark.parametrize("key", [*KEYS, SANDBOX_KEY], ids=lambda key: key.api_key[:11])
def test_the_usage_that_a_key_is_shown_adds_up(run: Run, key: Key) -> None:
    usage, records = run.usages[key], run.records_of(key)
    assert usage["cost"] == run.spent(key)
    assert sum(row["cost"] for row in usage["rows"]) == run.spent(key)
    assert sum(row["requests"] for row in usage["rows"]) == len(records)
    buckets = [record.buckets for record in records]
    shown = [sum(row[name] for row in usage["rows"]) for name in ("input_tokens", "cached_input_tokens")]
    assert shown[0] == sum(used.input + used.cache_write + used.audio_input for used in buckets)
    assert shown[1] == sum(used.cached_input for used in buckets)
    assert sum(row["output_tokens"] for row in usage["rows"]) == sum(u.output + u.audio_output for u in buckets)


def test_the_sandbox_is_recorded_as_it_told_its_client(run: Run) -> None:
    records = run.records_of(SANDBOX_KEY)
    recorded = (Told(each.endpoint, each.model, each.buckets.input, each.buckets.output) for each in records)
    assert Counter(recorded) == Counter(run.sandbox)
    for record in records:
        of_input, of_output = SANDBOX_RATES[record.model]
        cost = (of_input * record.buckets.input + of_output * record.buckets.output) / 1_000_000
        assert record.cost == cost.quantize(Decimal("0.0000001"), ROUND_HALF_UP), record


def _ending(plan: Plan) -> tuple[int, str]:
    """Return the status and the outcome that the record must have."""
    if plan.fate.is_after_usage and plan.streams and plan.route == RESPONSES:
        return 200, "completed"  # its last event is the one that tells the usage
    return {
        Fate.WHOLE: (200, "completed"),
        Fate.REFUSED: (429, "completed"),
        Fate.WRONG_KEY: (401, "completed"),
        Fate.CLIENT_BEFORE_HEAD: (0, "client_closed"),
        Fate.UPSTREAM_BEFORE_HEAD: (502, "upstream_error"),
        Fate.CLIENT_MIDWAY: (200, "client_closed"),
        Fate.CLIENT_AFTER_USAGE: (200, "client_closed"),
        Fate.UPSTREAM_MIDWAY: (200, "upstream_error"),
        Fate.UPSTREAM_AFTER_USAGE: (200, "upstream_error"),
    }[plan.fate]


def _saw_its_answer(plan: Plan, run: Run) -> bool:
    seen = run.seen[plan.number]
    if plan.fate is Fate.WHOLE:
        saw_usage = not plan.streams or plan.asks_usage or plan.route == RESPONSES
        return seen == (200, run.upstream.words[plan.number], True, saw_usage)
    if plan.fate.has_no_head or plan.fate in (Fate.REFUSED, Fate.WRONG_KEY):
        return seen.status == _ending(plan)[0]
    if plan.client != "raw" and not plan.streams:
        return seen == (0, 0, False, False)  # OpenAI's client gives no half of an answer
    return (seen.status, seen.words, seen.is_whole) == (200, run.upstream.words[plan.number], False)
