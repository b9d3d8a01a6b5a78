from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx2 as httpx
import pytest
from openai import AsyncOpenAI

from gateway.estimation import Estimator
from gateway.sandbox import SandboxTransport
from gateway.tests.estimates import PATIENT_S, output_tokens
from gateway.tests.fake_realtime import RealtimeUpstream, echo
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import DECIDED, answer, limited_proxy
from gateway.tests.live import LiveProxy
from gateway.tests.metered import Ledger
from gateway.tests.redis_server import REDIS_URL, needs_redis
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


@pytest.fixture(scope="module")
def module_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def answering_upstream(module_upstream: FakeUpstream) -> FakeUpstream:
    """An upstream whose answers say what they used, until the test sets another script."""
    module_upstream.script = answer
    module_upstream.requests.clear()
    return module_upstream


@pytest.fixture(scope="module", params=["memory", pytest.param("redis", marks=needs_redis)])
def _limited_proxy(request: pytest.FixtureRequest, module_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    shared = (
        {"REDIS_URL": "", "WORKERS": "1"} if request.param == "memory" else {"REDIS_URL": REDIS_URL, "WORKERS": "2"}
    )
    settings = {"SANDBOX_ENABLED": "true", "RESERVE_OUTPUT_TOKENS": "1000"}
    with limited_proxy(DECIDED, UPSTREAM_URL=module_upstream.url, **shared, **settings) as proxy:
        yield proxy


@pytest.fixture
def limited(_limited_proxy: LiveProxy, answering_upstream: FakeUpstream) -> LiveProxy:
    """A running proxy that holds keys to `DECIDED`, once with either store of what limits count."""
    return _limited_proxy


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
def uncut_store(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of a proxy that cuts nobody off, once with either store."""
    return {
        "REDIS_URL": "" if request.param == "memory" else REDIS_URL,
        "CUT_AT_SPEND_LIMIT": "false",
        "RESERVE_OUTPUT_TOKENS": "500",
    }


@pytest.fixture(scope="module")
def patient() -> Iterator[Estimator]:
    """An estimator that has its process, and waits for it as long as it takes."""
    estimator = Estimator(timeout_s=PATIENT_S)
    assert asyncio.run(output_tokens(estimator, "hello world")) == 2
    yield estimator
    asyncio.run(estimator.aclose())
