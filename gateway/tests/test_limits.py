"""The arithmetic of limits, and both stores of their counts held to one behaviour: memory, and a real Redis."""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from gateway.addresses import ProxyTrust
from gateway.demand import demand_of, model_fields, thinks_unseen
from gateway.endpoints import endpoint_of
from gateway.errors import ModelNotAllowedError
from gateway.limit_memory import MemoryStore
from gateway.limit_redis import LimitsAwayError, RedisStore
from gateway.limiter import FormGuard
from gateway.limits import Ask, Limits, Refusal, counted_address, duration_text, month_of, next_month_s, take
from gateway.tests.calls import PATIENCE_S, until
from gateway.usage import RequestFacts, request_facts, weighed_form

REDIS_URL = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379/9"
MONTH = "2026-11"


def redis_answers() -> bool:
    try:
        with redis.Redis.from_url(REDIS_URL, socket_connect_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


needs_redis = pytest.mark.skipif(not os.environ.get("CI") and not redis_answers(), reason="no Redis answers")


# Arithmetic


@given(st.integers(1, 10_000), st.lists(st.floats(0, 5), min_size=1, max_size=300))
def test_no_more_passes_than_the_limit_at_once_and_what_comes_back_in_time(limit: int, pauses: list[float]) -> None:
    now, full_at, taken = 1_795_300_000.0, 0.0, 0
    began = now
    for pause in pauses:
        now += pause
        bucket = take(full_at, now, limit=limit, amount=1)
        if not bucket.wait_s:
            full_at = bucket.full_at
            taken += 1
    assert taken <= limit + (now - began) * limit / 60 + 1e-3


def test_after_the_told_wait_there_is_enough() -> None:
    now = 1_795_300_000.0
    full_at = take(0, now, limit=30, amount=30).full_at
    refused = take(full_at, now, limit=30, amount=1)
    assert refused.wait_s == pytest.approx(2.0, abs=1e-3)
    assert refused.remaining == 0
    assert not take(full_at, now + refused.wait_s, limit=30, amount=1).wait_s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0171, "17ms"), (1, "1s"), (1.25, "1.25s"), (59.5, "59.5s"), (360, "6m0s"), (3725, "1h2m5s")],
)
def test_times_are_told_as_openai_tells_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_months_end_where_the_calendar_says() -> None:
    for year in range(2024, 2032):
        for month in range(1, 13):
            now = calendar.timegm((year, month, 15, 3, 4, 5))
            next_one = calendar.timegm((year + (month == 12), month % 12 + 1, 1, 0, 0, 0))
            assert next_month_s(now) == next_one - now
            assert month_of(now) == f"{year}-{month:02}"


def test_models_are_allowed_by_name_and_by_beginning() -> None:
    limits = Limits(models=("gpt-4o-mini", "o3*"))
    assert [limits.allows_model(name) for name in ("gpt-4o-mini", "GPT-4o-mini", "o3", "o3-pro")] == [True] * 4
    assert not any(map(limits.allows_model, ("gpt-4o", "gpt-4o-mini-2024-07-18", "", "xo3")))
    assert Limits().allows_model("")


def test_networks_are_of_both_families() -> None:
    limits = Limits(networks=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")))
    assert limits.allows_address(ip_address("192.0.2.7"))
    assert limits.allows_address(ip_address("2001:db8::1"))
    assert not limits.allows_address(ip_address("192.0.3.7"))
    assert not limits.allows_address(None)


# Addresses


def scope(client: str | None, *forwarded: str) -> dict[str, object]:
    headers = [(b"x-forwarded-for", said.encode()) for said in forwarded]
    return {"client": (client, 1234) if client else None, "headers": headers}


@pytest.mark.parametrize(
    ("client", "forwarded", "found"),
    [
        ("198.51.100.1", (), "198.51.100.1"),
        ("198.51.100.1", ("203.0.113.9",), "198.51.100.1"),  # nobody trusts it
        ("127.0.0.1", ("203.0.113.9",), "203.0.113.9"),
        ("127.0.0.1", ("6.6.6.6, 203.0.113.9",), "203.0.113.9"),  # what stands before is the client's own word
        ("127.0.0.1", ("6.6.6.6", "203.0.113.9, 10.1.1.1"), "203.0.113.9"),
        ("127.0.0.1", ("203.0.113.9:4711",), "203.0.113.9"),
        ("127.0.0.1", ("[2001:db8::5]:4711",), "2001:db8::5"),
        ("127.0.0.1", ("::ffff:203.0.113.9",), "203.0.113.9"),
        ("127.0.0.1", ("203.0.113.9, nonsense",), "127.0.0.1"),
        ("127.0.0.1", ("",), "127.0.0.1"),
        ("127.0.0.1", ("10.0.0.5",), "10.0.0.5"),
        ("not an address", (), None),
        (None, ("203.0.113.9",), None),
    ],
)
def test_only_trusted_proxies_are_believed(client: str | None, forwarded: tuple[str, ...], found: str | None) -> None:
    trust = ProxyTrust(["127.0.0.1", "::1", "10.0.0.0/8"])
    address = trust.client_of(scope(client, *forwarded))
    assert (None if address is None else str(address)) == found


def test_ipv6_counts_by_its_network() -> None:
    assert counted_address(ip_address("2001:db8:1:2:3::4")) == counted_address(ip_address("2001:db8:1:2:ffff::"))
    assert counted_address(ip_address("2001:db8:1:3::")) != counted_address(ip_address("2001:db8:1:2::"))
    assert counted_address(ip_address("192.0.2.1")) == "192.0.2.1"


# What a request may use


def demand(body: bytes, path: bytes = b"/v1/chat/completions") -> tuple[int, int, bool]:
    endpoint = endpoint_of("POST", path)
    facts = request_facts(endpoint, body)
    assert facts is not None
    found = demand_of(endpoint, facts, body=body, body_bytes=len(body), output_tokens=1000, reference_tokens=50)
    return found.most.input_tokens, found.most.output_tokens, found.is_stated


@pytest.mark.parametrize(
    ("body", "path", "output", "is_stated"),
    [
        (b'{"model":"m"}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m","max_tokens":7}', b"/v1/chat/completions", 7, True),
        (b'{"model":"m","max_tokens":7,"max_completion_tokens":9}', b"/v1/chat/completions", 9, True),
        (b'{"model":"m","max_tokens":7,"n":3}', b"/v1/chat/completions", 21, True),
        (b'{"model":"m","max_output_tokens":8}', b"/v1/responses", 8, True),
        # A bound that the endpoint does not know bounds nothing.
        (b'{"model":"m","max_output_tokens":8}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m","max_tokens":8}', b"/v1/responses", 1000, False),
        (b'{"model":"m","max_tokens":8}', b"/v1/messages", 8, False),
        (b'{"model":"m","max_tokens":-5}', b"/v1/chat/completions", 0, True),
        (b'{"model":"m","max_tokens":"7"}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m","max_tokens":1e99}', b"/v1/chat/completions", 1000, False),
        (b'{"model":"m"}', b"/v1/completions", 16, True),
        (b'{"model":"m","prompt":["a","b"],"max_tokens":5,"n":2,"best_of":4}', b"/v1/completions", 40, True),
        (b'{"model":"m","prompt":[1,2,3],"max_tokens":5}', b"/v1/completions", 5, True),
        (b'{"model":"m","prompt":[[1],[2]],"max_tokens":5}', b"/v1/completions", 10, True),
    ],
)
def test_what_may_be_written_is_what_the_request_says(body: bytes, path: bytes, output: int, is_stated: bool) -> None:
    assert demand(body, path) == (len(body), output, is_stated)


def test_what_is_attached_counts_as_a_reference_and_not_by_its_bytes() -> None:
    short = (
        b'{"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,"}}]}]}'
    )
    long = short.replace(b";base64,", b";base64," + b"A" * 100_000)
    assert demand(short)[0] == demand(long)[0]
    assert demand(short)[0] > 2 * 50 - 1


@pytest.mark.parametrize(
    "model", ["o1", "o4-mini", "gpt-5-mini", "GPT-5.1", "openai/gpt-5", "ft:o4-mini:us::x", "grok-4"]
)
def test_models_that_think_unseen_are_known(model: str) -> None:
    assert thinks_unseen(model)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini", "omni-moderation", "grok-4-fast-non-reasoning", "m", ""])
def test_others_show_all_that_they_write(model: str) -> None:
    assert not thinks_unseen(model)


def image_demand(form: bytes, body_bytes: int) -> int:
    facts = weighed_form(RequestFacts(), form, b"multipart/form-data; boundary=b")
    endpoint = endpoint_of("POST", b"/v1/images/edits")
    found = demand_of(endpoint, facts, body=None, body_bytes=body_bytes, output_tokens=1000, reference_tokens=50)
    return found.most.input_tokens


def test_images_of_a_form_count_as_references_and_its_text_by_its_bytes() -> None:
    prompt = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 1000
    image = b'\r\n--b\r\ncontent-disposition: form-data; name="image[]"; filename="a.png"\r\n\r\n' + b"\0" * 1_600_000
    form = prompt + image * 2 + b"\r\n--b--\r\n"
    assert 2 * 50 + 1000 < image_demand(form, len(form)) < 2 * 50 + 1100
    # What comes behind the part that is looked at may be as many files as an edit may have.
    assert 16 * 50 + 1000 < image_demand(form, len(form) + 1) < 16 * 50 + 1100
    assert image_demand(b"no form at all", 14) == 14


def test_images_in_json_count_as_references() -> None:
    body = b'{"model":"m","prompt":"x","images":[{"image_url":"data:image/png;base64,' + b"A" * 1_600_000 + b'"}]}'
    tokens, _, _ = demand(body, b"/v1/images/edits")
    assert 50 < tokens < 150


def test_names_of_models_are_found_however_a_form_is_written() -> None:
    for name in (b'name="model"', b"name=model", b'NAME="model"', b'name = "mo\\del"', b"name*=utf-8''model"):
        assert model_fields(b"content-disposition: form-data; " + name + b"\r\n\r\nx\r\n") == 1, name
    assert model_fields(b'content-disposition: form-data; name="modela"\r\n\r\n') == 0


@given(st.integers(1, 200), st.integers(0, 40))
def test_a_form_that_names_two_models_is_refused_wherever_it_is_cut(step: int, filling: int) -> None:
    field = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n'
    for form, is_refused in ((field + b"x" * filling, False), (field + b"x" * filling + field, True)):
        guard = FormGuard()
        try:
            for start in range(0, len(form), step):
                guard.feed(form[start : start + step])
        except ModelNotAllowedError:
            assert is_refused
        else:
            assert not is_refused


# Stores


@dataclass
class Store:
    """A store, and names that nobody else uses."""

    store: MemoryStore | RedisStore
    nonce: str
    number: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """How much may have come back since the beginning."""
        return time.monotonic() - self.began_s

    def ask(self, limits: Limits, *, name: str = "k:a", tokens: int = 0, units: int = 0, spent: int = 0) -> Ask:
        return Ask("key", f"{name}:{self.nonce}", limits, tokens, units, spent)

    async def admit(self, *asks: Ask, month: str = MONTH) -> Refusal | None:
        self.number += 1
        return await self.store.admit(f"r{self.number}", asks, month=month, now=time.time())

    def settle(self, number: int, *asks: Ask, tokens: int = 0, units: int = 0, reserved: int = 0) -> None:
        self.store.settle(
            f"r{number}", asks, tokens=tokens, units=units, reserved=reserved, month=MONTH, now=time.time()
        )

    async def extend(self, number: int, *asks: Ask, units: int) -> bool:
        return await self.store.extend(f"r{number}", asks, units=units, month=MONTH, now=time.time())


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield Store(MemoryStore(), "")
        return
    shared = RedisStore(REDIS_URL, prefix="proxysite-test", deadline_s=PATIENCE_S)
    keeping = asyncio.create_task(shared.keep())
    await until(lambda: not shared.is_away)
    yield Store(shared, secrets.token_hex(6))
    keeping.cancel()


async def test_requests_per_minute(store: Store) -> None:
    ask = store.ask(Limits(requests_per_minute=3))
    assert [await store.admit(ask) for _ in range(3)] == [None] * 3
    refusal = await store.admit(ask)
    assert refusal is not None
    assert (refusal.scope, refusal.reason, refusal.limit, refusal.remaining) == ("key", "requests", 3, 0)
    assert refusal.retry_s is not None
    assert 20 - store.elapsed_s <= refusal.retry_s <= 20.1
    assert 60 - store.elapsed_s <= refusal.reset_s <= 60.1
    assert await store.admit(store.ask(Limits(requests_per_minute=3), name="k:b")) is None


async def test_tokens_that_were_not_used_come_back_and_those_used_beyond_are_a_debt(store: Store) -> None:
    limits = Limits(tokens_per_minute=1000)
    assert await store.admit(store.ask(limits, tokens=900)) is None
    refusal = await store.admit(store.ask(limits, tokens=200))
    assert refusal is not None
    assert refusal.reason == "tokens"
    assert 99 <= refusal.remaining <= 100 + store.elapsed_s * 1000 / 60
    store.settle(1, store.ask(limits, tokens=900), tokens=100)
    assert await store.admit(store.ask(limits, tokens=850)) is None
    store.settle(3, store.ask(limits, tokens=850), tokens=1850)
    refusal = await store.admit(store.ask(limits, tokens=1))
    assert refusal is not None
    assert refusal.retry_s is not None
    assert 57 - store.elapsed_s <= refusal.retry_s <= 57.1  # 951 more than there are


async def test_more_tokens_than_a_minute_has_never_pass(store: Store) -> None:
    refusal = await store.admit(store.ask(Limits(tokens_per_minute=1000), tokens=1001))
    assert refusal is not None
    assert refusal.retry_s is None


async def test_requests_at_once(store: Store) -> None:
    ask = store.ask(Limits(concurrent_streams=2))
    assert [await store.admit(ask) for _ in range(2)] == [None, None]
    refusal = await store.admit(ask)
    assert refusal is not None
    assert refusal.reason == "streams"
    store.settle(1, ask)
    assert await store.admit(ask) is None
    assert await store.admit(ask) is not None


async def test_money_is_reserved_settled_and_never_overshot(store: Store) -> None:
    limits = Limits(monthly_units=100)
    ask = store.ask(limits, units=40)
    assert [await store.admit(ask) for _ in range(2)] == [None, None]
    refusal = await store.admit(ask)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_s) == ("spend", 1.0)  # others may give back what they reserved
    store.settle(1, ask, units=15, reserved=40)
    assert await store.admit(ask) is None  # 15 + 40 + 40
    assert not await store.extend(4, ask, units=6)
    assert await store.extend(4, ask, units=5)
    store.settle(2, ask, units=40, reserved=40)
    store.settle(4, ask, units=45, reserved=45)
    assert (await store.admit(store.ask(limits, units=1))) is not None
    refusal = await store.admit(store.ask(limits, units=1))
    assert refusal is not None
    assert refusal.retry_s is None
    assert await store.admit(store.ask(limits, units=1), month="2026-12") is None


async def test_a_request_in_progress_gives_back_what_it_does_not_need_and_no_more(store: Store) -> None:
    limits = Limits(monthly_units=100)
    held = store.ask(limits, units=10)
    assert await store.admit(held) is None
    assert await store.extend(1, held, units=90)
    assert await store.admit(store.ask(limits, units=1)) is not None
    assert await store.extend(1, held, units=-60)
    assert await store.admit(store.ask(limits, units=61)) is not None
    assert await store.admit(store.ask(limits, units=60)) is None
    store.settle(1, held, units=40, reserved=40)
    store.settle(4, held, reserved=60)
    # As when its lease has ended meanwhile.
    assert await store.extend(9, held, units=-50)
    assert await store.admit(store.ask(limits, units=61)) is not None
    assert await store.admit(store.ask(limits, units=60)) is None


async def test_the_ledgers_word_counts_where_it_is_more(store: Store) -> None:
    limits = Limits(monthly_units=100)
    assert await store.admit(store.ask(limits, units=10, spent=91)) is not None
    assert await store.admit(store.ask(limits, units=9, spent=50)) is None


async def test_whoever_is_refused_by_one_limit_takes_nothing_of_the_others(store: Store) -> None:
    key = store.ask(Limits(requests_per_minute=5, concurrent_streams=5, monthly_units=50), units=10)
    full = store.ask(Limits(requests_per_minute=1), name="a:x")
    assert await store.admit(full) is None
    assert all([await store.admit(key, full) for _ in range(20)])
    assert [await store.admit(key) for _ in range(5)] == [None] * 5


async def test_two_hundred_at_once_on_the_last_cent(store: Store) -> None:
    ask = store.ask(Limits(monthly_units=100_000), units=700, spent=95_000)
    found = await asyncio.gather(*(store.admit(ask) for _ in range(200)))
    assert found.count(None) == 5_000 // 700


@given(st.lists(st.integers(0, 5), max_size=60))
def test_in_memory_what_is_taken_is_given_back_whatever_the_order(steps: list[int]) -> None:
    async def play() -> None:
        memory = Store(MemoryStore(), "")
        limits = Limits(concurrent_streams=3, monthly_units=1000)
        ask = memory.ask(limits, units=10)
        running: list[int] = []
        for step in steps:
            if step < 3:
                if await memory.admit(ask) is None:
                    running.append(memory.number)
            elif running:
                memory.settle(running.pop(step % len(running)), ask, reserved=10)
            assert len(running) <= 3
        for number in running:
            memory.settle(number, ask, reserved=10)
        state = memory.store._states.get(ask.name)  # type: ignore[union-attr]
        assert state is None or (state.open_requests, state.reserved_units, state.spent_units) == (0, 0, 0)

    asyncio.run(play())


async def test_memory_forgets_whoever_is_as_if_he_had_never_come() -> None:
    memory = MemoryStore()
    limits = Limits(requests_per_minute=60)
    now = time.time()
    for number in range(30_000):
        await memory.admit("r", [Ask("key", f"k:{number}", limits)], month=MONTH, now=now + number)
        memory.settle(
            "r", [Ask("key", f"k:{number}", limits)], tokens=0, units=0, reserved=0, month=MONTH, now=now + number
        )
    assert len(memory.names()) <= 10_000


# Redis alone


@needs_redis
async def test_a_dead_workers_reservations_end_with_their_lease(store: Store) -> None:
    if isinstance(store.store, MemoryStore):
        return
    limits = Limits(concurrent_streams=1, monthly_units=100)
    ask = store.ask(limits, units=100)
    assert await store.admit(ask) is None
    assert await store.admit(ask) is not None
    with redis.Redis.from_url(REDIS_URL) as client:
        live = f"proxysite-test:limits:{ask.name}:live"
        assert 50 < client.zscore(live, "r1") - time.time() <= 60
        client.zadd(live, {"r1": time.time() - 1})
    assert await store.admit(ask) is None


@needs_redis
async def test_what_a_dead_worker_reserved_is_free_however_late_anybody_asks_again(store: Store) -> None:
    if isinstance(store.store, MemoryStore):
        return
    ask = store.ask(Limits(monthly_units=100), units=100, spent=0)
    assert await store.admit(ask) is None
    with redis.Redis.from_url(REDIS_URL) as client:
        names = [f"proxysite-test:limits:{ask.name}{part}" for part in ("", ":live", ":held")]
        # All that tells of the request ends by itself, at one time; what was spent stays for weeks.
        assert all(100 < client.ttl(name) <= 120 for name in names[1:])
        client.hset(names[0], "s", 1)
        client.delete(*names[1:])
    assert await store.admit(ask._replace(units=99)) is None
    assert await store.admit(ask._replace(units=1)) is not None


@needs_redis
async def test_a_redis_whose_clock_is_set_back_refuses_nobody_for_that(store: Store) -> None:
    if isinstance(store.store, MemoryStore):
        return
    limits = Limits(requests_per_minute=2, tokens_per_minute=1000, concurrent_streams=3)
    ask = store.ask(limits, tokens=500)
    assert await store.admit(ask) is None
    with redis.Redis.from_url(REDIS_URL) as client:  # all of it becomes an hour older than Redis is
        name = f"proxysite-test:limits:{ask.name}"
        for field in ("r", "t", "c"):
            client.hincrbyfloat(name, field, 3600)
        client.zincrby(f"{name}:live", 3600, "r1")
    assert await store.admit(ask) is None
    refusal = await store.admit(ask)
    assert refusal is not None
    assert refusal.reason == "requests"
    assert refusal.retry_s == pytest.approx(30, abs=20)
    with redis.Redis.from_url(REDIS_URL) as client:
        assert client.zscore(f"{name}:live", "r1") - time.time() == pytest.approx(60, abs=20)
        assert float(client.hget(name, "t")) - time.time() == pytest.approx(60, abs=20)


def replaced(ask: Ask, *, spent: int) -> Ask:
    return ask._replace(spent_units=spent)


async def test_a_redis_that_never_answers_costs_fifty_milliseconds_three_times_and_then_nothing() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(8):  # what a connection begins with, and the epoch
            assert await reader.read(65536)
            writer.write(b"+OK\r\n")
        with contextlib.suppress(asyncio.CancelledError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    shared = RedisStore(f"redis://127.0.0.1:{port}/0", prefix="p")
    keeping = asyncio.create_task(shared.keep())
    await until(lambda: not shared.is_away)
    ask = Ask("key", "k:x", Limits(requests_per_minute=1))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(LimitsAwayError):
            await shared.admit("r", [ask], month=MONTH, now=time.time())
        times.append(time.perf_counter() - began)
    # Milliseconds more where nothing else runs, perhaps seconds on a busy machine.
    assert all(0.045 < each < 5 for each in times), times
    assert shared.is_away
    for _ in range(3):
        with pytest.raises(LimitsAwayError):
            # Not awaited: there is nothing to wait for.
            shared.admit("r", [ask], month=MONTH, now=time.time()).send(None)
    keeping.cancel()
    server.close()


@needs_redis
async def test_what_was_used_while_redis_was_away_is_told_later() -> None:
    waiting: list[asyncio.StreamWriter] = []
    is_cut = True

    async def relayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if is_cut:
            writer.close()
            return
        waiting.append(writer)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", 6379)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(relayed, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    nonce = secrets.token_hex(6)
    shared = Store(RedisStore(f"redis://127.0.0.1:{port}/9", prefix="proxysite-test", deadline_s=PATIENCE_S), nonce)
    assert isinstance(shared.store, RedisStore)
    keeping = asyncio.create_task(shared.store.keep())
    ask = shared.ask(Limits(monthly_units=100), units=0)
    shared.settle(1, ask, units=70)
    is_cut = False
    told = shared.ask(Limits(monthly_units=100), units=31)

    async def is_known() -> bool:
        try:
            refusal = await shared.admit(told)
        except LimitsAwayError:
            return False
        if refusal is None:
            shared.settle(shared.number, told, reserved=31)
        return refusal is not None and refusal.retry_s is None  # 70 are spent, not reserved

    deadline = time.monotonic() + PATIENCE_S
    while not await is_known():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    keeping.cancel()
    for writer in waiting:
        writer.close()
    server.close()
