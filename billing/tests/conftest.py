from __future__ import annotations

import os
from collections.abc import Iterator
from decimal import Decimal

import pytest
from django.core.cache import cache

from billing.models import ApiKey
from billing.services import give_grant, record_events
from billing.tests.routes import used
from gateway.tests.redis_server import running_redis


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    # In Redis clear() would take what other tests have in the same database, a broker's queues for one.
    getattr(cache, "delete_pattern", lambda pattern: cache.clear())("*")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that really runs: the one of the environment, or one started here."""
    if url := os.environ.get("REDIS_URL"):
        yield url
        return
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def key() -> ApiKey:
    """API_KEY in the ledger: 18 USD granted, 0.0800000 used today."""
    record_events([used()])
    found = ApiKey.objects.get()
    give_grant(found, Decimal(18))
    return found
