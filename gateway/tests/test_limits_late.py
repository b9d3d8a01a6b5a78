"""A Redis that answers late, to somebody who has left, or hangs up: what limits have counted stays right."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import hiredis

from gateway.limit_redis import RedisStore
from gateway.tests.calls import until


@contextlib.asynccontextmanager
async def counting(url: str) -> AsyncIterator[RedisStore]:
    """Hold the counts that are kept there, whether it answers or not."""
    store = RedisStore(url, prefix="proxysite-test")
    keeping = asyncio.create_task(store.keep())
    yield store
    keeping.cancel()


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
