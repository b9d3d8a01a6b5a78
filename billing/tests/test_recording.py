from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from django.db import connection
from django.db.models import Sum
from django.test.utils import CaptureQueriesContext
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import Settings

from billing import dashboard, rows
from billing.events import Usage, UsageEvent
from billing.models import ApiKey, Grant, KeyDay, ModelPrice, Pricing, UsageDay, UsageHour, UsageRecord
from billing.pricing import MAX_QUANTITY
from billing.services import RecordResult, record_events
from billing.tests.recorded import SAMPLE_COST, day_rows
from billing.tests.samples import NOW, event, key_fingerprint

pytestmark = pytest.mark.django_db


def test_an_event_becomes_a_record_with_its_price_and_a_day() -> None:
    one = event(
        upstream_request_id="req_1", service_tier="default", is_stream=True, usage=Usage(input_tokens=10, seconds=1.5)
    )
    result = record_events([one])
    assert result == RecordResult(recorded=1, duplicates=0, rejected=0)
    assert (result.sums["input_tokens"], result.sums["audio_ms"], result.sums["unpriced_requests"]) == (10, 1500, 1)
    assert record_events([one]).sums == {}

    record = UsageRecord.objects.get()
    assert record.key == ApiKey.objects.get(fingerprint=one.key_fingerprint)
    for name in ("endpoint", "method", "model", "service_tier", "is_stream", "status", "outcome", "usage_source"):
        assert getattr(record, name) == getattr(one, name)
    assert (record.pk, record.started_at, record.day) == (one.id, NOW, NOW.date())
    assert (record.input_tokens, record.audio_ms) == (10, 1500)
    assert (record.proxy_us, record.first_byte_ms, record.duration_ms) == (250, 120, 900)
    assert (record.request_bytes, record.response_bytes, record.upstream_request_id) == (300, 700, "req_1")
    day = UsageDay.objects.get()
    assert (day.key_id, day.day, day.model, day.endpoint) == (record.key_id, NOW.date(), one.model, one.endpoint)
    assert (day.requests, day.errors, day.input_tokens, day.audio_ms) == (1, 0, 10, 1500)
    assert (day.begun_streams, day.first_byte_ms_sum, day.proxy_us_sum) == (1, 120, 250)
    for total in (KeyDay.objects.get(key=record.key), UsageHour.objects.get(hour=NOW.hour, model=one.model)):
        assert (total.day, total.requests, total.errors, total.tokens) == (NOW.date(), 1, 0, 10)
        assert (total.cost_usd, total.first_byte_ms_sum, total.proxy_us_sum) == (0, 120, 250)


def test_only_streams_that_began_count_for_the_time_to_the_first_byte() -> None:
    failed = event(is_stream=True, status=502, outcome="upstream_error", first_byte_ms=0)
    record_events([event(is_stream=True, first_byte_ms=120), failed, event(is_stream=False, first_byte_ms=900)])
    for days in (UsageDay, UsageHour, KeyDay):
        begun = days.objects.aggregate(streams=Sum("begun_streams"), ms=Sum("first_byte_ms_sum"))
        assert (begun["streams"], begun["ms"]) == (1, 120)
    total = sum((point.total for point in dashboard.series(dashboard.PERIODS[0], NOW)), dashboard.Total())
    assert (total.requests, total.first_byte_ms) == (3, 120)


def test_a_known_model_is_priced_by_the_list_and_says_which() -> None:
    record_events([event()])
    record = UsageRecord.objects.get()
    assert (record.cost_usd, record.pricing, record.price_source) == (SAMPLE_COST, Pricing.PRICED, "list")
    assert record.price_version.startswith("genai-prices")
    assert UsageDay.objects.get().cost_usd == SAMPLE_COST


def test_an_unknown_model_is_unpriced_and_never_zero() -> None:
    record_events([event(model="nobody-knows-me")])
    record = UsageRecord.objects.get()
    assert (record.cost_usd, record.pricing) == (None, Pricing.UNPRICED)
    assert (UsageDay.objects.get().cost_usd, UsageDay.objects.get().unpriced_requests) == (0, 1)


SESSION = {"method": "GET", "endpoint": "/v1/realtime", "status": 101, "model": "gpt-realtime"}


@pytest.mark.parametrize(
    ("given", "pricing"),
    [
        ({"method": "GET", "endpoint": "/v1/models", "model": ""}, Pricing.FREE),
        ({"status": 404, "model": "nobody-knows-me"}, Pricing.FREE),
        ({"endpoint": "/v1/moderations", "model": "omni-moderation-latest"}, Pricing.FREE),
        ({"endpoint": "/v1/videos", "model": "sora-2"}, Pricing.UNPRICED),
        ({"outcome": "client_closed"}, Pricing.UNPRICED),
        ({"outcome": "client_closed", "status": 0}, Pricing.UNPRICED),
        ({"outcome": "client_closed", "status": 0, "model": ""}, Pricing.FREE),
        ({"usage_source": "upstream"}, Pricing.FREE),
        (SESSION, Pricing.FREE),
        (SESSION | {"usage_source": "estimated"}, Pricing.UNPRICED),
        (SESSION | {"usage_source": "estimated", "outcome": "refused"}, Pricing.UNPRICED),
        (SESSION | {"usage_source": "estimated", "model": ""}, Pricing.UNPRICED),
    ],
)
def test_no_usage_is_free_only_where_nothing_can_have_been_charged(given: dict[str, Any], pricing: Pricing) -> None:
    record_events([event(**{"usage": Usage(), "usage_source": "none"} | given)])
    record = UsageRecord.objects.get()
    assert record.pricing == pricing
    assert record.cost_usd == (0 if pricing == Pricing.FREE else None)


def test_an_operators_price_goes_before_the_list_from_its_date_on() -> None:
    for day, rate in ((10, "1"), (15, "2"), (25, "4")):
        ModelPrice.objects.create(
            model="GPT-4o-mini", valid_from=dt.datetime(2026, 11, day, tzinfo=dt.UTC), input=Decimal(rate), output=0
        )
    usage = Usage(input_tokens=1_000_000)
    record_events([event(at=dt.datetime(2026, 11, day, 1, tzinfo=dt.UTC), usage=usage) for day in (9, 12, 15)])
    found = UsageRecord.objects.order_by("started_at").values_list("cost_usd", "price_source")
    assert list(found) == [(Decimal("0.15"), "list"), (1, "own"), (2, "own")]


def test_a_price_may_begin_between_two_requests_of_a_second() -> None:
    for microsecond, rate in ((0, 1), (300_000, 2), (700_000, 1)):
        ModelPrice.objects.create(model="mine", valid_from=NOW.replace(microsecond=microsecond), input=Decimal(rate))
    usage = Usage(input_tokens=1_000_000)
    given = [0, 299_999, 300_000, 699_999, 700_000, 999_999]
    record_events([event(at=NOW.replace(microsecond=each), model="mine", usage=usage) for each in given])
    assert list(UsageRecord.objects.order_by("started_at").values_list("cost_usd", flat=True)) == [1, 1, 2, 2, 1, 1]


def test_an_operators_pattern_prices_what_begins_like_it_and_the_longest_wins() -> None:
    for name, rate in (("llama-*", 1), ("llama-4-*", 2), ("llama-4-scout", 3)):
        ModelPrice.objects.create(model=name, valid_from=NOW, input=Decimal(rate))
    models = ("llama-3", "llama-4-maverick", "llama-4-scout")
    record_events([event(model=name, usage=Usage(input_tokens=1_000_000)) for name in models])
    assert dict(UsageRecord.objects.values_list("model", "cost_usd")) == dict(zip(models, (1, 2, 3), strict=True))


def test_a_price_or_factor_that_changes_between_two_batches_counts_from_the_next() -> None:
    usage = Usage(input_tokens=1_000_000)
    costs = []
    for rate in (1, 2):
        ModelPrice.objects.update_or_create(model="mine", valid_from=NOW, defaults={"input": Decimal(rate)})
        record_events([event(id=f"rate {rate}", model="mine", usage=usage)])
        costs.append(UsageRecord.objects.get(pk=f"rate {rate}").cost_usd)
    ApiKey.objects.update(price_factor=Decimal("0.5"))
    record_events([event(id="factor", model="mine", usage=usage)])
    ModelPrice.objects.all().delete()
    record_events([event(id="none", model="mine", usage=usage)])
    costs += [UsageRecord.objects.get(pk=pk).cost_usd for pk in ("factor", "none")]
    assert costs == [1, 2, 1, None]


def test_events_alike_but_in_their_times_and_sizes_keep_each_their_own() -> None:
    later = [0, 1, 0.000001, 3599, 3600, 86_400]
    given = [event(at=NOW + dt.timedelta(seconds=s), proxy_ms=n / 1000, request_bytes=n) for n, s in enumerate(later)]
    record_events(given)
    found = UsageRecord.objects.order_by("request_bytes").values_list("started_at", "day", "proxy_us")
    times = [NOW + dt.timedelta(seconds=s) for s in later]
    assert list(found) == [(at, at.date(), n) for n, at in enumerate(times)]
    assert list(UsageHour.objects.order_by("day", "hour").values_list("hour", "requests")) == [
        (12, 4),
        (13, 1),
        (12, 1),
    ]


def test_one_odd_event_among_others_like_it_is_made_to_fit_alone() -> None:
    odd = event(upstream_request_id="a\x07b", proxy_ms=0.1234567, usage=Usage(input_tokens=-5))
    record_events([event(upstream_request_id="fine"), odd, event(upstream_request_id="fine")])
    found = sorted(UsageRecord.objects.values_list("upstream_request_id", "proxy_us", "input_tokens", "pricing"))
    assert found == [("a�b", 123, 0, "unpriced"), *[("fine", 250, 1000, "priced")] * 2]


@pytest.mark.parametrize(
    "usage",
    [
        Usage(input_tokens=-1, output_tokens=500),
        Usage(input_tokens=MAX_QUANTITY + 1, output_tokens=500),
        Usage(output_tokens=500, images=1 << 62),
        Usage(output_tokens=500, seconds=-0.1),
        Usage(output_tokens=500, seconds=1e13),
        Usage(input_tokens=2**62),
        Usage(output_tokens=-1),
        Usage(seconds=float("inf")),
    ],
)
@pytest.mark.parametrize(("status", "method"), [(200, "POST"), (101, "GET")])
def test_of_a_usage_that_cannot_be_nothing_is_counted_and_nothing_is_free(
    usage: Usage, status: int, method: str
) -> None:
    odd = event(usage=usage, status=status, method=method, endpoint="/v1/responses")
    record_events([odd, event()])
    record = UsageRecord.objects.get(event_id=odd.id)
    assert (rows.usage_of(record), record.cost_usd, record.pricing) == (Usage(), None, "unpriced")
    day = {row.endpoint: row for row in UsageDay.objects.all()}["/v1/responses"]
    assert (day.input_tokens, day.output_tokens, day.images, day.audio_ms) == (0, 0, 0, 0)
    assert (day.requests, day.unpriced_requests, day.cost_usd) == (1, 1, 0)


def test_rows_of_a_kind_are_recorded_whole_however_many_they_are() -> None:
    usages = [Usage(input_tokens=n) for n in range(87)]
    usages += [Usage(input_tokens=n, images=1, seconds=n / 1000) for n in range(87, 110)]
    given = [event(usage=usage, upstream_request_id=f"req_{usage.input_tokens}") for usage in usages]
    result = record_events(given)
    assert (result.recorded, result.sums["input_tokens"], result.sums["images"]) == (110, sum(range(110)), 23)
    found = UsageRecord.objects.in_bulk([each.id for each in given])
    for each in given:
        record = found[each.id]
        assert rows.usage_of(record) == each.usage
        assert (record.upstream_request_id, record.duration_ms) == (each.upstream_request_id, each.duration_ms)
    assert record_events([*given, event()]) == RecordResult(recorded=1, duplicates=110, rejected=0)


odd_counts = st.sampled_from([0, 0, 0, 7, -1, MAX_QUANTITY, MAX_QUANTITY + 1])
odd_events = st.builds(
    event,
    id=st.sampled_from(["a", "x" * 64, "x" * 65, "", "a\x07", "a\x7f", "é\u2028"]),
    at=st.sampled_from([NOW, dt.datetime(2009, 12, 31, tzinfo=dt.UTC), dt.datetime(2100, 1, 1, tzinfo=dt.UTC)]),
    model=st.sampled_from(["gpt-4o", "a\x7f", 'a"b', "m" * 200]),
    status=st.sampled_from([200, -1, 1000]),
    usage=st.builds(
        Usage,
        input_tokens=odd_counts,
        output_tokens=odd_counts,
        images=odd_counts,
        seconds=st.sampled_from([0.0, 0.0, 1.5, 1 / 3, -1.0, 1e13]),
    ),
    upstream_request_id=st.sampled_from(["", "r" * 128, "r" * 129, "a\\", "a\x00"]),
    first_byte_ms=st.sampled_from([0, -1, 2**31 - 1, 2**31]),
    duration_ms=st.sampled_from([0, -1, 2**50, 2**50 + 1]),
    request_bytes=st.sampled_from([0, -1, 2**60, 2**60 + 1]),
    proxy_ms=st.sampled_from([0.0, 0.25, 0.0005, 1 / 3, -1.0, 1e9, 1e10]),
)


@given(st.lists(odd_events, min_size=1, max_size=3))
def test_an_event_that_its_decoder_has_looked_at_is_taken_in_like_any_other(events: list[UsageEvent]) -> None:
    texts = [msgspec.json.encode(each) for each in events]
    taken = []
    for given_so in (map(rows.event_in, texts), rows.events_in(texts)):
        intake, rejected = rows.Intake(), 0
        for each in given_so:
            assert each is not None
            try:
                intake.take(each)
            except rows.UnusableEventError:
                rejected += 1
        kept = {kind: [_stored(each) for each in found] for kind, found in intake.by_kind.items()}
        taken.append((kept, rejected))
    assert taken[0] == taken[1]


def _stored(event: UsageEvent) -> dict[str, Any]:
    stored: dict[str, Any] = msgspec.to_builtins(event) | {"proxy_us": rows.in_microseconds(event.proxy_ms)}
    del stored["proxy_ms"]
    return stored


def test_a_plain_event_is_seen_to_fit_by_its_decoder() -> None:
    text = msgspec.json.encode(event())
    (seen,) = rows.events_in([text])
    assert type(seen) is rows.FittingEvent
    assert rows.events_in([text, b'{"id":7}', b"{"])[1:] == [None, None]


def test_a_keys_factor_is_in_its_cost_and_in_the_record() -> None:
    ApiKey.objects.create(fingerprint=key_fingerprint("a"), price_factor=Decimal("1.5"))
    record_events([event()])
    record = UsageRecord.objects.get()
    assert (record.cost_usd, record.price_factor) == (SAMPLE_COST * Decimal("1.5"), Decimal("1.5"))


def test_the_same_events_again_add_nothing() -> None:
    events = [event(), event(model="nobody-knows-me")]
    record_events(events)
    before = day_rows()
    assert record_events([*events, event(id=events[0].id, key="b")]) == RecordResult(0, 3, 0)
    assert day_rows() == before
    assert UsageRecord.objects.count() == 2


def test_an_event_twice_in_one_batch_counts_once() -> None:
    one = event()
    assert record_events([one, one]) == RecordResult(recorded=1, duplicates=1, rejected=0)
    assert UsageDay.objects.get().requests == 1


@pytest.mark.parametrize(
    "given",
    [
        {"status": 401},
        {"status": 403},
        {"status": 204, "method": "OPTIONS"},
        {"status": 307},
        {"status": 200, "outcome": "refused"},
        {"status": 502, "outcome": "upstream_error"},
        {"status": 0, "outcome": "client_closed", "usage_source": "estimated"},
    ],
)
def test_a_key_that_the_upstream_never_accepted_leaves_no_trace_but_the_record(given: dict[str, Any]) -> None:
    record_events([event(key=f"guess {n}", model=f"made up {n}", **given) for n in range(20)])
    assert not ApiKey.objects.exists()
    assert UsageRecord.objects.filter(key=None).count() == 20
    assert UsageDay.objects.get().requests == 20


def test_a_401_of_a_known_key_is_recorded_with_it() -> None:
    record_events([event()])
    record_events([event(status=401, usage=Usage(), usage_source="none")])
    assert UsageRecord.objects.filter(key__isnull=False).count() == 2
    assert sum(UsageDay.objects.values_list("errors", flat=True)) == 1


def test_an_accepted_websocket_makes_a_key() -> None:
    record_events([event(status=101, endpoint="/v1/realtime")])
    assert ApiKey.objects.get().hint == "sk-…wxyz"


def test_model_names_made_up_by_a_client_do_not_fill_the_roll_ups() -> None:
    record_events([event()])
    made_up = [event(model=f"made up {n}", status=404, usage=Usage(), usage_source="none") for n in range(30)]
    record_events(made_up)
    assert UsageDay.objects.count() == 2
    assert UsageDay.objects.get(model="").errors == 30


def test_first_and_last_use_follow_the_events_in_whatever_order_they_come() -> None:
    hours = [dt.timedelta(hours=n) for n in (5, 9, 2, 7)]
    for delay in hours:
        record_events([event(at=NOW + delay)])
    key = ApiKey.objects.get()
    assert (key.first_used_at, key.last_used_at) == (NOW + hours[2], NOW + hours[1])


def test_the_default_grant_is_given_on_first_use_and_never_again(settings: Settings) -> None:
    settings.DEFAULT_GRANT_USD = Decimal("18")
    entered = ApiKey.objects.create(fingerprint=key_fingerprint("entered by an operator"))
    first = [event(), event(), event(key="entered by an operator")]
    record_events(first)
    record_events([*first, event()])
    assert sorted(Grant.objects.values_list("key__fingerprint", "amount_usd")) == sorted(
        [(key_fingerprint("a"), Decimal(18)), (entered.fingerprint, Decimal(18))]
    )
    assert Grant.objects.filter(valid_from=NOW).count() == 2


def test_without_a_default_there_is_no_grant_also_not_later(settings: Settings) -> None:
    record_events([event()])
    settings.DEFAULT_GRANT_USD = Decimal("18")
    record_events([event()])
    assert not Grant.objects.exists()


def test_what_a_client_writes_is_made_to_fit() -> None:
    nasty = event(
        model="\x00evil\ud800" + "x" * 10_000,
        service_tier="t" * 500,
        upstream_request_id="\x00",
        status=99_999,
        duration_ms=2**70,
        request_bytes=2**80,
        proxy_ms=float("nan"),
        first_byte_ms=-5,
    )
    assert record_events([nasty, event()]).recorded == 2
    record = UsageRecord.objects.get(pk=nasty.id)
    assert record.model.startswith("�evil�x")
    assert len(record.model) == 128
    assert (record.status, record.proxy_us, record.first_byte_ms) == (999, 0, 0)


@pytest.mark.parametrize(
    "given",
    [{"id": ""}, {"id": "x" * 65}, {"started_at": float("nan")}, {"started_at": 5.0}, {"key_fingerprint": "sk-1"}],
)
def test_a_damaged_event_is_rejected_and_the_others_recorded(given: dict[str, Any]) -> None:
    damaged = msgspec.structs.replace(event(), **given)
    assert record_events([damaged, event()]) == RecordResult(recorded=1, duplicates=0, rejected=1)


def test_the_widths_of_the_columns_are_those_that_events_are_cut_to() -> None:
    for name, most_chars in rows._TEXTS.items():
        field = (ApiKey if name == "key_hint" else UsageRecord)._meta.get_field(name.removeprefix("key_"))
        assert field.max_length == most_chars


def test_the_number_of_queries_does_not_grow_with_the_batch() -> None:
    with CaptureQueriesContext(connection) as few:
        record_events([event(key="x")])
    many_events = [event(key=f"k{n % 50}", model=f"m{n % 7}", at=NOW + dt.timedelta(days=n % 3)) for n in range(500)]
    with CaptureQueriesContext(connection) as many:
        record_events(many_events)
    assert len(many) == len(few)
