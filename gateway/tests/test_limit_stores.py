"""Both stores of what limits count held to one behaviour: memory, and a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from gateway.limit_memory import MemoryStore
from gateway.limit_redis import LimitsAwayError, RedisStore
from gateway.limits import Ask, Limits
from gateway.tests.calls import PATIENCE_S, until
from gateway.tests.redis_server import REDIS_URL, needs_redis
from gateway.tests.stores import MONTH, Store


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


async def test_tokens_used_beyond_a_minutes_are_told_of_without_taking_any(store: Store) -> None:
    limits = Limits(tokens_per_minute=1000, requests_per_minute=1, concurrent_streams=1, monthly_units=1)
    ask = store.ask(limits, tokens=1000)
    assert await store.admit(ask) is None
    assert await store.overdrawn(ask) is None
    store.settle(1, ask, tokens=400, is_end=False)
    refusal = await store.overdrawn(ask)
    assert refusal is not None
    assert (refusal.scope, refusal.reason, refusal.limit, refusal.remaining) == ("key", "tokens", 1000, 0)
    assert refusal.retry_s is not None
    assert 24 - store.elapsed_s <= refusal.retry_s <= 24.1
    store.settle(1, ask, tokens=400)
    assert await store.overdrawn(ask) is None
    # Of requests at once, and of money, nothing was taken.
    again = store.ask(Limits(concurrent_streams=1, monthly_units=1), units=1)
    assert await store.admit(again) is None


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
