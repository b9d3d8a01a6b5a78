"""Many conversations at once, each waiting for a slow upstream, beside event streams that must not be late."""

from __future__ import annotations

import asyncio
import json
import time

import uvloop

from bench import load
from bench.load import AnswerClient, LoadError
from bench.measure import SETTLE_S, STREAM_RATE_PER_S, Bench, Figures, Meter, Start, percentile
from bench.proxies import Target
from bench.upstream import SLOW_ANSWER_S, SLOW_MODEL

ROUNDS = 2  # new sessions, and then the same with a memory
KEYS = 50
SETTLE_AFTER_S = 0.5


def conversations(bench: Bench, name: str, start: Start) -> dict[str, Figures]:
    """Seconds until the answers of one message in each conversation, all sent at once; nothing for nginx.

    The slowest round counts. Lateness is that of event streams through the same worker all the while.
    """
    if name == "nginx":
        return {}
    with start(name) as target:
        bench.loop(target, 1)  # warm-up
        try:
            return {figure: {name: value} for figure, value in uvloop.run(_measured(bench, target)).items()}
        except (LoadError, OSError) as exc:
            bench.note(f"conversations, {name}: {exc}")
            return {"conversations_slowest_s": {name: None}}


async def _measured(bench: Bench, target: Target) -> dict[str, float]:
    count = bench.plan.conversations
    clients = [await _connected(target) for _ in range(count)]
    meter = Meter(bench, target)
    rounds: list[list[float]] = []
    try:
        async with load.open_streams(
            target.address, streams=bench.plan.conversation_streams, rate_per_s=STREAM_RATE_PER_S
        ) as window:
            await load.start_streams(bench.upstream.plain)
            await asyncio.sleep(SETTLE_S)
            window.recording = True
            with load.no_collections():
                for number in range(ROUNDS):
                    rounds.append(await _all_at_once(clients, number))
                    await asyncio.sleep(SETTLE_AFTER_S)
            window.recording = False
            if window.cut:
                raise LoadError(f"{window.cut} streams were cut meanwhile")
            late_us = window.lateness_us
    finally:
        for client in clients:
            client.transport.abort()
    spent_s = meter.read()
    return {
        "conversations_first_s": min(map(min, rounds)),
        "conversations_slowest_s": max(map(max, rounds)),
        "conversations_lateness_p99_ms": percentile(late_us, 99) / 1000,
        "conversations_lateness_max_ms": max(late_us) / 1000,
        "conversations_cpu_ms": spent_s / (count * ROUNDS) * 1000,
    }


async def _connected(target: Target) -> AnswerClient:
    loop = asyncio.get_running_loop()
    host = "127.0.0.1" if target.address.tls else None
    _, client = await loop.create_connection(
        AnswerClient, "127.0.0.1", target.address.port, ssl=target.address.tls, server_hostname=host
    )
    return client


async def _all_at_once(clients: list[AnswerClient], round_number: int) -> list[float]:
    """Return the seconds that each answer took."""
    began_ns = time.monotonic_ns()
    asked = [client.ask(_message(number, round_number)) for number, client in enumerate(clients)]
    async with asyncio.timeout(load.SOCKET_TIMEOUT_S):
        answered_ns = await asyncio.gather(*asked)
    seconds = [(at_ns - began_ns) / 1e9 for at_ns in answered_ns]
    if min(seconds) < SLOW_ANSWER_S:
        raise LoadError(f"a conversation was answered after {min(seconds):.2f} s: the upstream did not wait")
    return seconds


def _message(number: int, round_number: int) -> bytes:
    fields = {
        "apiKey": f"sk-bench-{number % KEYS:024}",
        "sessionId": f"conversation-{number}",
        "content": f"What does a proxy cost, when {number} people talk at once? Round {round_number}.",
        "model": SLOW_MODEL,
    }
    return load.request_bytes("POST", "/pro/chat/completions", json.dumps(fields).encode())
