"""A hundred thousand keys with limits of their own: read in bounded time and memory, and all of them hold."""

from __future__ import annotations

import datetime as dt
import random
import time
import tracemalloc
from decimal import Decimal

import pytest
from django.utils import timezone
from pytest_django import Settings

from billing.models import ApiKey, KeyDay
from billing.reserving import Prices
from billing.selectors import key_policies
from gateway.addresses import ProxyTrust
from gateway.limit_memory import MemoryStore
from gateway.limiter import Limiter, LimiterOptions
from gateway.limits import Limits
from gateway.tally import Tally
from gateway.tests.attacks import MIB, memory_of, worker_of
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from proxysite.limiting import PolicyReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
KEYS = 100_000


def fingerprint(number: int) -> str:
    return f"{number:064x}"


def requests_of(number: int) -> int:
    return number % 1000 + 1


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def decided(db: None) -> None:
    """All keys are decided of at one time, as by an import; each tenth has spent something this month."""
    at = timezone.now()
    ApiKey.objects.bulk_create(
        (
            ApiKey(
                fingerprint=fingerprint(number),
                hint=f"sk-…{number:06}",
                requests_per_minute=requests_of(number),
                monthly_usd=Decimal(number % 50 + 1),
                allowed_models="gpt-4o-mini" if number % 5 == 0 else "",
                allowed_networks="10.0.0.0/8" if number % 7 == 0 else "",
                policy_changed_at=at,
            )
            for number in range(KEYS)
        ),
        batch_size=5000,
    )
    spenders = ApiKey.objects.filter(fingerprint__endswith="0").values_list("pk", flat=True)
    today = dt.datetime.now(dt.UTC).date()
    KeyDay.objects.bulk_create(
        (KeyDay(key_id=key_id, day=today, cost_usd=Decimal("0.5")) for key_id in spenders), batch_size=5000
    )


def make_reader(clock: Clock) -> tuple[PolicyReader, Limiter]:
    prices = Prices()
    limiter = Limiter(
        store=MemoryStore(),
        prices=prices,
        trust=ProxyTrust([]),
        fingerprint=lambda raw: raw.hex(),
        tally=Tally(),
        options=LimiterOptions(),
    )
    return PolicyReader(limiter, prices, clock=clock), limiter


def test_a_hundred_thousand_keys_are_read_once_and_then_only_what_is_new(decided: None, settings: Settings) -> None:
    settings.GATEWAY_MODE = "open"
    clock = Clock()
    reader, limiter = make_reader(clock)
    tracemalloc.start()
    rules = reader.read().rules
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rules.overrides) == KEYS
    for number in random.Random(6).sample(range(KEYS), 1000):
        found = rules.of_key(fingerprint(number))
        assert (found.requests_per_minute, found.monthly_units) == (requests_of(number), (number % 50 + 1) * 10**7)
        assert found.models == (("gpt-4o-mini",) if number % 5 == 0 else ())
        assert bool(found.networks) == (number % 7 == 0)
    assert rules.spent_units[fingerprint(0)] == 5_000_000
    assert held_bytes / KEYS < 400

    clock.now_s += 100
    reader.read()  # for the last time it looks at them again
    clock.now_s += 100
    assert list(key_policies(reader._since(clock.now_s))) == []
    ApiKey.objects.filter(fingerprint=fingerprint(7)).update(
        requests_per_minute=None,
        monthly_usd=None,
        allowed_models="",
        allowed_networks="",
        policy_changed_at=timezone.now(),
    )
    ApiKey.objects.filter(fingerprint=fingerprint(16)).update(
        requests_per_minute=77, price_factor=Decimal(2), policy_changed_at=timezone.now()
    )
    KeyDay.objects.update(cost_usd=Decimal("0.75"))
    limiter._recent = {fingerprint(32)}
    began_s = time.thread_time()
    after = reader.read().rules
    assert time.thread_time() - began_s < 0.5
    assert after.of_key(fingerprint(7)) == Limits()
    assert (after.of_key(fingerprint(16)).requests_per_minute, after.factor_of(fingerprint(16))) == (77, 2)
    # Of what was spent, that of keys in use and of those that are new.
    assert [after.spent_units[fingerprint(number)] for number in (16, 32, 48)] == [7_500_000, 7_500_000, 5_000_000]
    # The rules that were in force meanwhile have not changed under anybody's hands.
    assert (len(rules.overrides), len(after.overrides)) == (KEYS, KEYS - 1)
    assert rules.of_key(fingerprint(16)).requests_per_minute == 17
    clock.now_s += 100
    assert reader.read().rules.overrides is after.overrides
    clock.now_s += 3600
    began_s = time.thread_time()
    assert len(reader.read().rules.overrides) == KEYS - 1  # all of it again, as every hour
    assert time.thread_time() - began_s < 8


_IMPORT = """
from decimal import Decimal
from django.conf import settings
from django.utils import timezone
from billing import keys
from billing.models import ApiKey
pepper, at = settings.KEY_PEPPER.encode(), timezone.now()
ApiKey.objects.bulk_create((
    ApiKey(
        fingerprint=keys.fingerprint(b"sk-many-%012d" % number, pepper=pepper), hint="sk-m", policy_changed_at=at,
        requests_per_minute=number % 1000 + 1, blocked=number % 1000 == 999,
    )
    for number in range({keys})
), batch_size=5000)
"""


async def answer(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer(b'{"data": []}')


def test_a_worker_knows_a_hundred_thousand_keys_from_its_first_request_on() -> None:
    with FakeUpstream(answer) as upstream, LiveProxy(UPSTREAM_URL=upstream.url, REDIS_URL="") as proxy:

        def statuses(number: int, times: int) -> list[int]:
            headers = {"authorization": f"Bearer sk-many-{number:012d}"}
            return [proxy.get("/v1/models", headers=headers).status_code for _ in range(times)]

        before = memory_of(worker_of(proxy))
        proxy.stop()
        proxy.manage("shell", "-v0", "-c", _IMPORT.format(keys=KEYS))
        proxy.start()
        assert statuses(77_000, 2) == [200, 429]
        assert statuses(99_002, 4) == [200, 200, 200, 429]
        assert statuses(55_999, 1) == [403]
        assert memory_of(worker_of(proxy)) - before < 60 * MIB
        assert "could not be read yet" not in proxy.log
