"""One connection to Redis for many callers, on the event loop that serves."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import uvloop

from gateway.redis_line import RedisAwayError, RedisLine
from gateway.tests.redis_server import running_redis


def test_whoever_asks_when_a_deadline_is_just_passing_is_answered_or_told_so(tmp_path: Path) -> None:
    async def ask() -> list[Any]:
        # So short that uvloop calls back at once: there is no timer then that could say when.
        line = RedisLine(url, deadline_s=0.0001)

        async def one() -> Any:
            return await line.call("PING")

        keeping = asyncio.create_task(line.keep())
        await line.opened.wait()
        try:
            return await asyncio.gather(*(one() for _ in range(50)), return_exceptions=True)
        finally:
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping

    with running_redis(tmp_path) as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answers = runner.run(ask())
    assert {type(answer) for answer in answers} <= {bytes, RedisAwayError}, answers
