from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.tests.fake_realtime import RealtimeUpstream, echo
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


@pytest.fixture(scope="module")
def socket_upstream() -> Iterator[RealtimeUpstream]:
    with RealtimeUpstream() as server:
        yield server


@pytest.fixture
def echoing_upstream(socket_upstream: RealtimeUpstream) -> Iterator[RealtimeUpstream]:
    """The same, playing `echo` until the test sets another script; it must not have failed."""
    socket_upstream.play(echo)
    yield socket_upstream
    assert socket_upstream.wait_until_idle()
    assert not socket_upstream.failures
