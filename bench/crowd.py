"""Many clients of a topology, over TLS and through nginx, who remember what each of them saw."""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx2 as httpx
import psycopg

from deploy.topology import Topology

KEY = "sk-crowd-0123456789abcdef"
PAUSE_S = 0.02
AFTER_FAILURE_S = 0.2
_NUMBERED = re.compile(r"req-(\d+)")


@dataclass(frozen=True, slots=True)
class Kind:
    """What one request asks for; one that `hangs_up` leaves after its first event."""

    model: str = "gpt-4o-mini"
    is_stream: bool = True
    hangs_up: bool = False

    @property
    def is_to_succeed(self) -> bool:
        return not self.hangs_up and not self.model.startswith("fault-")


STREAM = Kind()
WHOLE = Kind(is_stream=False)
HANG_UP = Kind(hangs_up=True)
CUT = Kind(model="fault-cut")
REFUSED = Kind(model="fault-500", is_stream=False)


@dataclass(slots=True)
class Seen:
    """One request as its client saw it; times in seconds of the monotonic clock, `failure` is "" if it went well."""

    kind: Kind
    started_at: float
    ended_at: float = 0.0
    number: int = 0
    gateway: str = ""
    failure: str = ""
    is_complete: bool = False


@dataclass
class Crowd:
    """`with Crowd(topology, kinds=[…], clients=…) as crowd:` asks all the time, each client one at a time."""

    topology: Topology
    kinds: Sequence[Kind]
    clients: int
    seen: list[Seen] = field(default_factory=list)
    lateness_s: list[float] = field(default_factory=list)
    _is_over: bool = False

    def __enter__(self) -> Crowd:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="crowd", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over = True
        self._thread.join(120)

    def since(self, started_at: float) -> list[Seen]:
        """Return the requests that have ended and were begun no earlier."""
        return [seen for seen in list(self.seen) if seen.started_at >= started_at]

    async def _run(self) -> None:
        context = ssl.create_default_context(cafile=str(self.topology.certificate))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.clients)
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=120, limits=limits) as client:
            await asyncio.gather(*(self._ask_on(client, number) for number in range(self.clients)))

    async def _ask_on(self, client: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while not self._is_over:
            seen = Seen(chance.choice(self.kinds), time.monotonic())
            try:
                await self._ask(client, seen)
            except (httpx.HTTPError, OSError) as exc:
                seen.failure = f"{type(exc).__name__}: {exc}"
            seen.ended_at = time.monotonic()
            self.seen.append(seen)
            await asyncio.sleep(AFTER_FAILURE_S if seen.failure else PAUSE_S)

    async def _ask(self, client: httpx.AsyncClient, seen: Seen) -> None:
        kind = seen.kind
        body = {"model": kind.model, "messages": [{"role": "user", "content": "Hello"}], "stream": kind.is_stream}
        headers = {"authorization": f"Bearer {KEY}"}
        address = f"{self.topology.url}/v1/chat/completions"
        async with client.stream("POST", address, json=body, headers=headers) as answer:
            # The gateway's own errors have an id of another form.
            found = _NUMBERED.fullmatch(answer.headers.get("x-request-id", ""))
            seen.number = int(found[1]) if found else 0
            seen.gateway = answer.headers.get("x-gateway", "")
            if not kind.is_stream or answer.status_code != 200:
                content = await answer.aread()
                seen.is_complete = answer.status_code == 200
                if not seen.is_complete:
                    seen.failure = f"{answer.status_code} {content[:200].decode(errors='replace')}"
                return
            last = ""
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._note_lateness(line)
                    if kind.hangs_up:
                        return
                last = line or last
            seen.is_complete = last == "data: [DONE]"
            if not seen.is_complete:
                seen.failure = f"ended after {last[:200]}"

    def _note_lateness(self, line: str) -> None:
        sent_at = json.loads(line[6:]).get("sent_at")
        if sent_at is not None:
            self.lateness_s.append(time.monotonic() - sent_at)


# The ledger afterwards


def ledger_numbers(topology: Topology) -> Counter[tuple[int, int]]:
    """Return how often each (number by request id, prompt tokens) stands in the ledger."""
    statement = "SELECT upstream_request_id, input_tokens FROM billing_usagerecord WHERE upstream_request_id <> ''"
    with psycopg.connect(topology.database_url()) as connection:
        rows = connection.execute(statement).fetchall()
    return Counter((int(request_id.removeprefix("req-")), tokens) for request_id, tokens in rows)


def wait_for_ledger(topology: Topology, wanted: set[int], *, timeout_s: float = 90.0) -> Counter[tuple[int, int]]:
    """Return what stands in the ledger, once all the wanted numbers do or the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = ledger_numbers(topology)
        if wanted <= {number for number, _ in found} or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def ledger_faults(topology: Topology, crowd: Crowd, *, also: frozenset[int] = frozenset()) -> list[str]:
    """Return what the ledger has wrong: complete answers (and `also`) missing, requests twice, other tokens."""
    complete = {seen.number for seen in crowd.seen if seen.is_complete}
    found = wait_for_ledger(topology, complete | also)
    times = Counter(number for number, _ in found.elements())
    missing = sorted((complete | also) - times.keys())
    twice = sorted(number for number, count in times.items() if count > 1)
    wrong = sorted(number for number, tokens in found if number in complete and tokens != number)
    faults = []
    for what, numbers in (("missing", missing), ("twice", twice), ("with other tokens", wrong)):
        if numbers:
            faults.append(f"{len(numbers)} requests {what}: {numbers[:5]}")
    return faults
