from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from sessions_api.tests.conversations import execute, remember, sibling


@pytest.fixture(scope="session")
def _chat_proxy(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url,
        SANDBOX_ENABLED="true",
        JOURNAL_FLUSH_SECONDS="0.1",
        # As long as a busy machine may take to renew it; who waits for it waits for the tests' own patience.
        SESSION_LEASE_SECONDS="5",
        SESSION_WAIT_SECONDS="50",
        BALANCE_RATE_PER_MINUTE="1000000",
    ) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def _impatient_proxy(_chat_proxy: LiveProxy) -> Iterator[LiveProxy]:
    with sibling(_chat_proxy, SESSION_WAIT_SECONDS="0.3") as proxy:
        yield proxy


@pytest.fixture
def talking(upstream: FakeUpstream) -> FakeUpstream:
    """The upstream behind `chat_proxy`, saying how many messages it was told and what the last one said."""
    upstream.script = remember
    return upstream


@pytest.fixture
def chat_proxy(_chat_proxy: LiveProxy, talking: FakeUpstream) -> LiveProxy:
    """A running proxy that remembers nothing yet."""
    for table in ("chatmessage", "chatsession", "chatholding"):
        execute(_chat_proxy, f"DELETE FROM sessions_api_{table}")
    return _chat_proxy


@pytest.fixture
def impatient_proxy(_impatient_proxy: LiveProxy, chat_proxy: LiveProxy) -> LiveProxy:
    """Another proxy on the same database, in which a message waits for 0.3 s only."""
    return _impatient_proxy
