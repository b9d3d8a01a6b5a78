"""What operators decide, announced to a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import redis
from django.db import OperationalError

from gateway.admission import Policy
from gateway.tests.calls import until
from gateway.tests.redis_server import running_redis


async def test_a_change_is_heard_of_behind_one_that_the_database_did_not_answer_for(tmp_path: Path) -> None:
    known: list[int] = []
    asked = 0

    def load() -> Iterator[int]:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise OperationalError("the database is away")
        yield asked

    policy = Policy(load=load, apply=known.append)
    policy.start()
    with running_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        await until(lambda: known == [1])
        listening = asyncio.create_task(policy.listen(url, "changes"))
        await until(lambda: client.publish("changes", "1") == 1)
        await until(lambda: asked == 2)
        client.publish("changes", "2")
        await until(lambda: known == [1, 3])
        listening.cancel()
    policy.close()


async def test_a_change_is_heard_of_behind_a_line_that_died_without_a_word(tmp_path: Path) -> None:
    known: list[int] = []
    lines = 0

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal lines
        lines += 1
        is_first = lines == 1
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if not (is_first and len(known) > 1):
                    sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    policy = Policy(load=lambda: [1], apply=known.append, silence_s=0.5)
    policy.start()
    with running_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        await until(lambda: known == [1])
        port = int(url.rpartition(":")[2].partition("/")[0])
        server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        through = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        listening = asyncio.create_task(policy.listen(through, "changes"))
        await until(lambda: client.publish("changes", "1") == 1)
        await until(lambda: known == [1, 1])
        await until(lambda: client.publish("changes", "2") > 0 and len(known) > 2)
        listening.cancel()
        server.close()
    policy.close()
