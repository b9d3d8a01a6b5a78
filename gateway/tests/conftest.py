from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx2 as httpx
import pytest
from openai import AsyncOpenAI

from gateway.sandbox import SandboxTransport
from gateway.tests.fake_realtime import RealtimeUpstream, echo
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import Ledger
from gateway.tests.sandbox_clients import BASE, NO_PAUSE, new_sdk


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


@pytest.fixture(scope="module")
def echoing_proxy(socket_upstream: RealtimeUpstream) -> Iterator[LiveProxy]:
    """A proxy in front of `echoing_upstream`, the sandbox on, that logs whatever it can."""
    with LiveProxy(UPSTREAM_URL=socket_upstream.url, SANDBOX_ENABLED="true", LOG_LEVEL="DEBUG") as live:
        yield live


@pytest.fixture
def wire(shared_upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    """An upstream of single bytes where `upstream` is one of sockets."""
    shared_upstream.requests.clear()
    shared_upstream.failures.clear()
    shared_upstream.signals.queue.clear()
    yield shared_upstream
    assert not shared_upstream.failures


@pytest.fixture(scope="module")
def bare_proxy(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    """A proxy in front of `wire`, with room for three."""
    with LiveProxy(UPSTREAM_URL=shared_upstream.url, MAX_OPEN_STREAMS="3") as live:
        yield live


@pytest.fixture
async def sdk() -> AsyncIterator[AsyncOpenAI]:
    """The official SDK, asking a sandbox of its own."""
    async with new_sdk() as client:
        yield client


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """A client of HTTP, asking a sandbox of its own."""
    transport = SandboxTransport(pace=NO_PAUSE)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        yield client
