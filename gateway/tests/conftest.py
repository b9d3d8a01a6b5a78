from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import Ledger


@pytest.fixture(scope="module")
def _ledger_proxy(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(UPSTREAM_URL=shared_upstream.url, JOURNAL_FLUSH_SECONDS="0.1") as proxy:
        yield proxy


@pytest.fixture
def metered(_ledger_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    return _ledger_proxy


@pytest.fixture
def ledger(metered: LiveProxy) -> Ledger:
    return Ledger(metered)
