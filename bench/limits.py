"""`python -m bench.limits`: what limits add to one request, in µs of the worker's CPU, by what is limited and where.

Redis, where `REDIS_URL` (redis://127.0.0.1:6379/9) answers, is asked over a real connection; its own CPU and the way
there are in the time of a request alone, and not in the CPU time. A task for each request is in both.
"""

# ruff: noqa: E402 - models are ready only once Django is set up

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")
django.setup()

from billing.events import Usage, UsageEvent
from billing.keys import Fingerprinter
from billing.reserving import Prices
from gateway.addresses import ProxyTrust
from gateway.headers import to_upstream
from gateway.limit_memory import MemoryStore
from gateway.limit_redis import RedisStore
from gateway.limiter import Limiter, LimiterOptions
from gateway.limits import Limits, Rules
from gateway.metering import Metering
from gateway.relay import Relay
from gateway.request_meter import RequestMeter
from gateway.tally import Tally

BODY = b'{"model":"gpt-4o-mini","max_tokens":100,"messages":[{"role":"user","content":"' + b"word " * 100 + b'"}]}'
SCOPE: dict[str, Any] = {
    "method": "POST",
    "raw_path": b"/v1/chat/completions",
    "client": ("127.0.0.1", 4711),
    "headers": [
        (b"host", b"proxy.example"),
        (b"authorization", b"Bearer sk-bench-0123456789"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(BODY)),
        (b"x-forwarded-for", b"203.0.113.9"),
    ],
}
EVENT = UsageEvent(
    id="e", started_at=time.time(), model="gpt-4o-mini", status=200, usage_source="upstream",
    usage=Usage(input_tokens=100, output_tokens=50), method="POST", endpoint="/v1/chat/completions",
)  # fmt: skip
MUCH = 10**12
LIMITED = {
    "requests per minute": Limits(requests_per_minute=10**6),
    "all four, models": Limits(10**6, 10**10, 10**6, MUCH, ("gpt-4o*",)),
}


class FixedPrices(Prices):
    """The list's prices, without a database."""

    def __init__(self) -> None:
        from billing.rating import Rater, _Book, _RefreshedBook

        super().__init__()
        rater = Rater.__new__(Rater)
        rater._own, rater._refreshed, rater._tariffs = _Book([]), _RefreshedBook([]), {}
        self._rater = rater


def metered(metering: Metering) -> RequestMeter:
    meter = metering.begin(SCOPE)
    meter.seen.wants_whole(to_upstream(SCOPE["headers"], host=b"upstream"))
    meter.seen.take_whole(BODY)
    return meter


async def run(limiter: Limiter, metering: Metering, *, at_once: int, requests: int) -> tuple[float, float]:
    """Return µs of CPU and of time for each request."""

    async def one(meter: RequestMeter) -> None:
        limiter.screen_request(meter, SCOPE)  # type: ignore[arg-type]
        await limiter.admit(meter, SCOPE)  # type: ignore[arg-type]
        if meter.hold is not None:
            meter.hold.settle(EVENT)

    best = (float("inf"), float("inf"))
    for _ in range(5):
        meters = [metered(metering) for _ in range(requests)]
        cpu, wall = time.process_time(), time.perf_counter()
        for start in range(0, requests, at_once):
            await asyncio.gather(*(one(meter) for meter in meters[start : start + at_once]))
        spent = (time.process_time() - cpu) / requests * 1e6, (time.perf_counter() - wall) / requests * 1e6
        best = min(best, spent)
    return best


def no_limits() -> float:
    relay = Relay.__new__(Relay)
    turns = 1_000_000
    began = time.perf_counter()
    for _ in range(turns):
        if relay.limiter is not None:
            raise AssertionError
    return (time.perf_counter() - began) / turns * 1e6


async def main() -> None:
    print(f"no limit anywhere: {no_limits():.3f} µs")
    metering = Metering(pepper=b"p" * 32, journal=[], estimates=None)  # type: ignore[arg-type]
    url = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379/9"
    shared = RedisStore(url, prefix="proxysite-bench", deadline_s=1.0)
    keeping = asyncio.create_task(shared.keep())
    await shared.wait_until_open(1.0)
    stores: dict[str, Any] = {"memory": MemoryStore()} | ({} if shared.is_away else {"redis": shared})
    for kind, store in stores.items():
        for name, limits in LIMITED.items():
            limiter = Limiter(
                store=store,
                prices=FixedPrices(),
                trust=ProxyTrust(["127.0.0.1"]),
                fingerprint=Fingerprinter(b"p" * 32),
                tally=Tally(),
                options=LimiterOptions(),
            )
            for whose, rules in (("key", Rules(key=limits)), ("key and address", Rules(key=limits, address=limits))):
                limiter.rules = rules
                for at_once in (1, 32):
                    cpu, wall = await run(limiter, metering, at_once=at_once, requests=3200)
                    what = f"{kind:6}  {whose:15}  {name:19}  {at_once:2} at once"
                    print(f"{what}: {cpu:6.1f} µs CPU, {wall:6.1f} µs")
    keeping.cancel()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
