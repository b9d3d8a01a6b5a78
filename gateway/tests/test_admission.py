"""What operators decide, announced to a worker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import redis
from django.db import OperationalError

from gateway.admission import Policy
from gateway.tests.calls import until
from gateway.tests.redis_server import running_redis


async def test_a_change_is_heard_of_behind_one_that_the_database_did_not_answer_for(tmp_path: Path) -> None:
    known: list[int] = []
    asked = 0

    def load() -> int:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise OperationalError("the database is away")
        return asked

    policy = Policy(load=load, apply=known.append)
    with running_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        listening = asyncio.create_task(policy.listen(url, "changes"))
        await until(lambda: client.publish("changes", "1") == 1)
        await until(lambda: asked == 1)
        client.publish("changes", "2")
        await until(lambda: known == [2])
        listening.cancel()
