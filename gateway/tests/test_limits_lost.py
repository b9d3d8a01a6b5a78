"""A Redis that begins anew, or takes nothing any more, under limits that were counted in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest
import redis

from gateway.limit_redis import LimitsAwayError, RedisStore
from gateway.limits import Ask, Limits
from gateway.tests.calls import PATIENCE_S, until
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.limited import COST, answer, ask, limited_proxy, metric, spent_by, wait_until_counting
from gateway.tests.live import LiveProxy, free_port, wait_until
from gateway.tests.redis_server import running_redis
from gateway.tests.stores import Store

KEY = "sk-lost-000000000001"
MONEY = Limits(monthly_units=100)


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    # One of its own: others would lose their memory, too.
    with running_redis(tmp_path) as address:
        yield address


@contextlib.asynccontextmanager
async def worker(url: str) -> AsyncIterator[Store]:
    """Count as another worker does, of the same keys."""
    shared = RedisStore(url, prefix="proxysite-test", deadline_s=PATIENCE_S)
    keeping = asyncio.create_task(shared.keep())
    await until(lambda: not shared.is_away)
    yield Store(shared, "")
    keeping.cancel()


def replaced(ask: Ask, *, spent: int) -> Ask:
    return ask._replace(spent_units=spent)


def forget_all(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.script_flush()
        client.flushall()


async def test_a_redis_that_lost_its_memory_begins_with_what_workers_and_the_ledger_know(url: str) -> None:
    async with worker(url) as store:
        one = store.ask(MONEY, units=40)
        assert await store.admit(one) is None
        forget_all(url)
        # 40 are reserved, and by the ledger's word 20 are spent.
        assert await store.admit(replaced(one, spent=20)._replace(units=41)) is not None
        assert await store.admit(replaced(one, spent=20)) is None
        forget_all(url)
        store.settle(1, one, units=35)
        refused = await store.admit(one)
        assert refused is not None
        assert refused.remaining == 100 - 20 - 35  # of which the other one has reserved 40


async def test_what_all_workers_together_have_spent_is_known_by_each_that_heard_of_it(url: str) -> None:
    async with worker(url) as first, worker(url) as second:
        await spend(first, 30)
        await spend(second, 40)
        forget_all(url)
        address = second.ask(MONEY, units=31)
        refused = await second.admit(address)
        assert refused is not None
        assert refused.remaining == 30
        assert await first.admit(replaced(address, spent=0)._replace(units=30)) is None


async def spend(store: Store, units: int) -> None:
    one = store.ask(MONEY, units=units)
    assert await store.admit(one) is None
    store.settle(store.number, one, units=units, reserved=units)
    assert await store.admit(store.ask(MONEY)) is None  # behind the settlement
    store.settle(store.number, store.ask(MONEY))


async def test_streams_in_progress_are_counted_again(url: str) -> None:
    async with worker(url) as store:
        one = store.ask(Limits(concurrent_streams=1))
        assert await store.admit(one) is None
        forget_all(url)
        assert await store.admit(one) is not None
        store.settle(1, one)
        assert await store.admit(one) is None


async def test_a_worker_that_knows_nothing_yet_takes_the_epoch_as_it_is(url: str) -> None:
    async with worker(url) as first:
        assert await first.admit(first.ask(MONEY, units=60)) is None
        async with worker(url) as second:
            assert await second.admit(second.ask(MONEY, units=41)) is not None
        with redis.Redis.from_url(url) as client:
            assert client.ttl("proxysite-test:limits:epoch") == -1


# A Redis that answers, and takes nothing


def calls_of(client: redis.Redis) -> int:
    """Return how many scripts were asked for; a probe is one each second."""
    return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])


@pytest.mark.parametrize("trouble", ["full", "replica"])
async def test_a_redis_that_only_answers_is_away_until_it_takes_what_is_written(url: str, trouble: str) -> None:
    async with worker(url) as store:
        one = store.ask(Limits(requests_per_minute=1))
        shared = store.store
        assert isinstance(shared, RedisStore)
        with redis.Redis.from_url(url) as client:
            if trouble == "full":
                client.config_set("maxmemory", "1mb")
            else:
                client.replicaof("127.0.0.1", "1")
            for _ in range(3):
                with pytest.raises(LimitsAwayError):
                    await store.admit(one)
            assert shared.is_away
            assert client.ping()
            probed = calls_of(client)
            await until(lambda: calls_of(client) > probed + 1)
            assert shared.is_away
            client.config_set("maxmemory", "0")
            client.replicaof("no", "one")
        await until(lambda: not shared.is_away)
        assert await store.admit(one) is None


async def test_a_redis_that_became_a_replica_is_left_for_the_one_that_its_address_leads_to(tmp_path: Path) -> None:
    with running_redis(tmp_path) as old, running_redis(tmp_path) as new:
        primary = old

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            port = int(primary.rpartition(":")[2].partition("/")[0])
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        async with worker(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0") as store:
            one = store.ask(Limits(requests_per_minute=1))
            shared = store.store
            assert isinstance(shared, RedisStore)
            primary = new
            with redis.Redis.from_url(old) as client:
                client.replicaof("127.0.0.1", "1")
            for _ in range(3):
                with pytest.raises(LimitsAwayError):
                    await store.admit(one)
            await until(lambda: not shared.is_away)
            assert await store.admit(one) is None
            with redis.Redis.from_url(new) as client:
                assert client.exists("proxysite-test:limits:epoch")
        server.close()


def test_a_full_redis_is_shown_as_away_all_the_time(tmp_path: Path) -> None:
    with running_redis(tmp_path) as url, FakeUpstream(answer) as upstream, redis.Redis.from_url(url) as client:
        settings = {"REDIS_URL": url, "KEY_REQUESTS_PER_MINUTE": "1"}
        with limited_proxy({}, UPSTREAM_URL=upstream.url, **settings) as proxy:
            client.config_set("maxmemory", "1mb")
            for _ in range(4):
                assert ask(proxy, KEY).status_code == 200
            probed = calls_of(client)
            wait_until(lambda: calls_of(client) > probed + 1)
            assert metric(proxy, "proxysite_limits_away") == 1
            assert proxy.log.count("limits are not counted") == 1
            assert "limits are counted again" not in proxy.log


# Through the proxy


@pytest.mark.parametrize("environment", [{"WORKERS": "2"}, {"ADDRESS_MONTHLY_USD": "0.002", "KEY_MONTHLY_USD": "1000"}])
def test_a_redis_that_restarts_empty_gives_no_money_back(tmp_path: Path, environment: dict[str, str]) -> None:
    """Of a key, and of an address, which no ledger knows."""
    port = free_port()
    decided = {KEY: {"monthly_usd": "0.0020000"} if "WORKERS" in environment else {}}
    settings = environment | {"REDIS_URL": f"redis://127.0.0.1:{port}/0", "ON_LIMITS_UNAVAILABLE": "refuse"}
    with FakeUpstream(answer) as upstream, contextlib.ExitStack() as stack:
        with running_redis(tmp_path, port):
            proxy = stack.enter_context(limited_proxy(decided, UPSTREAM_URL=upstream.url, **settings))
            statuses = [ask(proxy, KEY, json={"max_tokens": 500}).status_code for _ in range(8)]
            assert statuses.count(200) == 6  # of 0.000315 each
        if "WORKERS" in environment:  # each tells what it knows: one alone may not have heard of the other's last
            wait_until(lambda: metric(proxy, "proxysite_limits_away") == 2)
        with running_redis(tmp_path, port):
            if "WORKERS" not in environment:
                wait_until(lambda: ask(proxy, KEY, json={"max_tokens": 500}).status_code == 429)
            wait_until_counting(proxy)
            assert {ask(proxy, KEY, json={"max_tokens": 500}).status_code for _ in range(8)} == {429}
            wait_until(lambda: spent_by(proxy, KEY) == 6 * COST)
            assert len(upstream.requests) == 6


def test_what_is_in_progress_stays_reserved_when_redis_restarts_empty(tmp_path: Path) -> None:
    port, gate = free_port(), Gate()

    async def held(exchange: Exchange) -> None:
        await exchange.read_body()
        await gate.wait()
        usage = {"prompt_tokens": 100, "completion_tokens": 500, "total_tokens": 600}
        await exchange.answer(json.dumps({"model": "gpt-4o-mini", "choices": [], "usage": usage}).encode())

    statuses: list[int] = []

    def post(proxy: LiveProxy) -> None:
        statuses.append(ask(proxy, KEY, json={"max_tokens": 500}).status_code)

    settings = {"REDIS_URL": f"redis://127.0.0.1:{port}/0", "ON_LIMITS_UNAVAILABLE": "refuse"}
    with FakeUpstream(held) as upstream, contextlib.ExitStack() as stack:
        with running_redis(tmp_path, port):
            decided = {KEY: {"monthly_usd": "0.0010000"}}
            proxy = stack.enter_context(limited_proxy(decided, UPSTREAM_URL=upstream.url, **settings))
            threads = [threading.Thread(target=post, args=(proxy,)) for _ in range(5)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(upstream.requests) + len(statuses) == 5)
            passed = len(upstream.requests)
            assert passed == 3
        with running_redis(tmp_path, port):
            wait_until(lambda: ask(proxy, KEY, json={"max_tokens": 500}).status_code == 429)
            gate.open()
            for thread in threads:
                thread.join()
            assert len(upstream.requests) == passed
            wait_until(lambda: spent_by(proxy, KEY) == passed * COST)
            assert spent_by(proxy, KEY) <= Decimal("0.001")
