"""Limits of requests at once, for bodies that do not arrive."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import answer, ask, limited_proxy, metric
from gateway.tests.live import PATIENCE_S, LiveProxy, wait_until

SLOW, OTHER = "sk-slow-000000000001", "sk-other-00000000001"
HERE, THERE = "203.0.113.66", "198.51.100.1"


@pytest.fixture(scope="module")
def proxy() -> Iterator[LiveProxy]:
    settings = {"KEY_CONCURRENT_STREAMS": "2", "ADDRESS_CONCURRENT_STREAMS": "3", "MAX_OPEN_STREAMS": "20"}
    with (
        FakeUpstream(answer) as upstream,
        limited_proxy({}, UPSTREAM_URL=upstream.url, REDIS_URL="", **settings) as live,
    ):
        yield live


def half_sent(proxy: LiveProxy, api_key: str, address: str) -> socket.socket:
    client = proxy.connect()
    head = f"Authorization: Bearer {api_key}\r\nX-Forwarded-For: {address}\r\nContent-Type: application/json\r\n"
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n%bContent-Length: 1000\r\n\r\n{" % head.encode())
    return client


def answer_of(client: socket.socket, *, within_s: float = 0.5) -> bytes:
    """Return what a client is answered, b"" where the gateway waits for the rest."""
    client.settimeout(within_s)
    with contextlib.suppress(TimeoutError):
        return client.recv(65536)
    return b""


def test_a_key_and_an_address_have_no_more_half_sent_bodies_than_requests_at_once(proxy: LiveProxy) -> None:
    with contextlib.ExitStack() as clients:
        held = [clients.enter_context(half_sent(proxy, SLOW, HERE)) for _ in range(2)]
        wait_until(lambda: metric(proxy, "proxysite_open_streams ") == 2)
        refused = answer_of(clients.enter_context(half_sent(proxy, SLOW, THERE)), within_s=PATIENCE_S)
        assert refused.startswith(b"HTTP/1.1 429")
        assert b'"rate_limit_exceeded"' in refused
        held.append(clients.enter_context(half_sent(proxy, OTHER, HERE)))
        wait_until(lambda: metric(proxy, "proxysite_open_streams ") == 3)
        refused = answer_of(clients.enter_context(half_sent(proxy, OTHER, HERE)), within_s=PATIENCE_S)
        assert refused.startswith(b"HTTP/1.1 429")
        assert [answer_of(client) for client in held] == [b""] * 3
        # Who has not sent anything by half is let in, and the slots are free again when their clients leave.
        assert ask(proxy, "sk-whole-00000000001", headers={"x-forwarded-for": THERE}).status_code == 200
    wait_until(lambda: metric(proxy, "proxysite_open_streams ") == 0)
    with half_sent(proxy, SLOW, HERE) as first, half_sent(proxy, SLOW, HERE) as second:
        wait_until(lambda: metric(proxy, "proxysite_open_streams ") == 2)
        assert [answer_of(first), answer_of(second)] == [b"", b""]
