"""Requests to a topology as its clients make them: over TLS, through nginx."""

from __future__ import annotations

import itertools
import json
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import psycopg
from openai import OpenAI

from deploy.topology import Topology
from gateway.tests.fake_upstream import Exchange, Gate

PATIENCE_S = 120.0  # only a failing test waits so long
MODEL = "gpt-4o-mini"
MILLION = 1_000_000
USD_EACH = 0.75  # of one answer of `Numbered`
MESSAGES = [{"role": "user", "content": "How do you do?"}]


def trust(topology: Topology) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(topology.certificate))


def new_client(topology: Topology, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=topology.url, verify=trust(topology), trust_env=False, timeout=PATIENCE_S, **options)


def new_sdk(topology: Topology, key: str, **options: Any) -> OpenAI:
    http = httpx.Client(verify=trust(topology), trust_env=False)
    options = {"max_retries": 0, "timeout": PATIENCE_S, **options}
    return OpenAI(api_key=key, base_url=f"{topology.url}/v1", http_client=http, **options)


class Numbered:
    """A script that answers chat completions with a usage; each request has a number in `x-request-id`.

    With a gate, each stream waits after its first event until it is open.
    """

    def __init__(self, gate: Gate | None = None, *, name: str = "req") -> None:
        self._name = name
        self._numbers = itertools.count(1)
        self._gate = gate
        self.begun = 0

    async def __call__(self, exchange: Exchange) -> None:
        body = json.loads(await exchange.read_body() or b"{}")
        number = next(self._numbers)
        usage = {"prompt_tokens": MILLION, "completion_tokens": MILLION, "total_tokens": 2 * MILLION}
        request_id = ("x-request-id", f"{self._name}-{number}")
        answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "Hello"}
            answer |= {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
            headers = (("content-type", "application/json"), request_id)
            await exchange.answer(json.dumps(answer).encode(), headers=headers)
            return
        answer |= {"object": "chat.completion.chunk"}
        delta = {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}
        await exchange.start_stream(headers=(("content-type", "text/event-stream"), request_id))
        await exchange.events(answer | delta, done=False)
        self.begun += 1
        if self._gate is not None:
            await self._gate.wait(5 * PATIENCE_S)  # while a busy machine starts gateways, perhaps
        await exchange.events(answer | delta, answer | {"choices": [], "usage": usage})
        await exchange.end_stream()


def wait_until(is_so: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def recorded(topology: Topology) -> Counter[str]:
    """Return how often each of the upstream's request ids stands in the ledger."""
    with psycopg.connect(topology.database_url()) as connection:
        rows = connection.execute("SELECT upstream_request_id FROM billing_usagerecord").fetchall()
    return Counter(str(row[0]) for row in rows)
