"""A Redis that answers late, to somebody who has left, or hangs up: what limits have counted stays right."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import hiredis
import pytest
import redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from gateway.limit_redis import LEASE_SECONDS, RedisStore
from gateway.limit_scripts import ADMIT, SETTLE
from gateway.limits import Ask, Limits
from gateway.tests.calls import PATIENCE_S, until
from gateway.tests.fake_realtime import RealtimeUpstream, echo
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import answer, ask, limited_proxy
from gateway.tests.live import wait_until
from gateway.tests.redis_server import running_redis
from gateway.tests.stores import Store

KEY = "sk-late-0000000000001"


@contextlib.asynccontextmanager
async def counting(url: str, *, deadline_s: float = 0.05) -> AsyncIterator[RedisStore]:
    """Hold the counts that are kept there, whether it answers or not."""
    store = RedisStore(url, prefix="proxysite-test", deadline_s=deadline_s)
    keeping = asyncio.create_task(store.keep())
    yield store
    keeping.cancel()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    with running_redis(tmp_path) as url:
        async with counting(url, deadline_s=PATIENCE_S) as shared:
            await until(lambda: not shared.is_away)
            yield Store(shared, "")


async def admitted_for_nobody(store: Store, one: Ask) -> None:
    """Ask for a client that leaves while Redis is asked."""

    async def leave() -> None:
        asking = asyncio.current_task()
        assert asking is not None
        asking.cancel()  # at its next wait
        await store.admit(one)

    leaving = asyncio.create_task(leave())
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_whoever_is_refused_and_has_left_gets_no_tokens_back_that_he_had_not_taken(store: Store) -> None:
    one = store.ask(Limits(tokens_per_minute=1000), tokens=900)
    assert await store.admit(one) is None
    await admitted_for_nobody(store, one)
    # The store tells of it behind its next look at Redis.
    held = store.ask(Limits(concurrent_streams=1), name="k:b")
    await admitted_for_nobody(store, held)
    await until_admitted(store, held)
    assert await store.admit(one) is not None


async def test_what_is_reserved_and_given_back_at_one_moment_adds_up(store: Store) -> None:
    """As a session does: one response ends while the next one is asked for."""
    one = store.ask(Limits(monthly_units=100), units=40)
    assert await store.admit(one) is None
    assert all(await asyncio.gather(store.extend(1, one, units=50), store.extend(1, one, units=-40)))
    assert await store.admit(one._replace(units=51)) is not None
    assert await store.admit(one._replace(units=50)) is None


async def test_however_much_was_used_while_redis_was_away_it_is_told_a_little_at_a_time() -> None:
    """All at once would take longer than an answer may, and the store would take Redis for away again."""
    settled = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal settled
        parser, unanswered = hiredis.Reader(), 0
        while data := await reader.read(65536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                script = command[1].decode() if command[0] == b"EVALSHA" else ""
                if script == SETTLE.sha:
                    settled += 1
                    unanswered += 1
                elif script == ADMIT.sha:
                    # Only now, so that all that was sent before it is in flight.
                    writer.write(b"*1\r\n:1\r\n" * unanswered + b"*2\r\n:0\r\n:0\r\n")
                    unanswered = 0
                else:
                    writer.write(b"$5\r\nepoch\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    shared = RedisStore(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", prefix="p", deadline_s=PATIENCE_S)
    store = Store(shared, "")
    one = store.ask(Limits(tokens_per_minute=10))
    for number in range(1000):
        store.settle(number, one, tokens=1)
    keeping = asyncio.create_task(shared.keep())
    await until(lambda: not shared.is_away)
    assert await store.admit(one) is None
    assert 0 < settled < 200
    while settled < 1000:
        assert await store.admit(one) is None
    assert settled == 1000
    keeping.cancel()
    server.close()


def test_a_request_that_is_refused_since_redis_is_late_holds_nothing_when_redis_counts_it(tmp_path: Path) -> None:
    settings = {"LIMITS_TIMEOUT_SECONDS": "0.05", "ON_LIMITS_UNAVAILABLE": "refuse", "KEY_CONCURRENT_STREAMS": "1"}
    with (
        running_redis(tmp_path) as url,
        FakeUpstream(answer) as upstream,
        redis.Redis.from_url(url) as client,
        limited_proxy({}, UPSTREAM_URL=upstream.url, REDIS_URL=url, **settings) as proxy,
    ):
        began_s = time.monotonic()
        client.client_pause(300)
        assert ask(proxy, KEY).status_code == 503
        # Its one stream would be free again with the lease of the one that was refused.
        wait_until(lambda: ask(proxy, KEY).status_code == 200)
        assert time.monotonic() - began_s < LEASE_SECONDS / 2


async def test_sessions_that_wait_for_redis_together_are_counted_one_by_one(tmp_path: Path) -> None:
    settings = {"MAX_OPEN_STREAMS": "3", "KEY_REQUESTS_PER_MINUTE": "1000"}
    with running_redis(tmp_path) as url, RealtimeUpstream() as upstream, redis.Redis.from_url(url) as client:
        upstream.play(echo)
        with limited_proxy({}, UPSTREAM_URL=upstream.url, REDIS_URL=url, **settings) as proxy:
            address = f"{proxy.url.replace('http', 'ws')}/v1/realtime?model=m"
            client.client_pause(1000)
            dials = [connect(address, proxy=None, open_timeout=PATIENCE_S) for _ in range(8)]
            found = await asyncio.gather(*dials, return_exceptions=True)
            opened = [each for each in found if isinstance(each, ClientConnection)]
            for each in opened:
                await each.close()
    assert len(opened) == 3, found
    assert {each.response.status_code for each in found if isinstance(each, InvalidStatus)} == {503}


async def until_admitted(store: Store, one: Ask) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while await store.admit(one) is not None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_redis_that_hangs_up_behind_its_greeting_is_waited_for_without_work() -> None:
    connections = 0

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        parser, answered = hiredis.Reader(), 0
        while answered < 7:  # what a connection begins with
            parser.feed(await reader.read(65536))
            while parser.gets() is not False:
                answered += 1
                writer.write(b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with counting(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0") as store:
        await until(lambda: connections > 1)
        began_s, used_s = time.monotonic(), time.process_time()
        await until(lambda: connections > 10)
        # One attempt in 0.1 s: of what this test itself asks for, and of nothing else, some 0.03 s.
        assert time.process_time() - used_s < (time.monotonic() - began_s) / 5
        assert store.is_away
    server.close()
