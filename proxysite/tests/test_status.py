"""`/status.json`: what it says of the upstream, and what it costs anybody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway.tests.egress_proxies import ConnectProxy
from gateway.tests.fake_upstream import Exchange, FakeUpstream, echo
from gateway.tests.live import LiveProxy, free_port
from proxysite.status import FRESH_S

_RECORDS = "SELECT endpoint FROM billing_usagerecord"


async def _refuse(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\n{}")


async def _fail(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}")


async def _cut(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{}")
    exchange.abort()


async def _wait(exchange: Exchange) -> None:
    await exchange.wait_until_client_leaves()


@pytest.fixture
def own_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(_refuse) as upstream:
        yield upstream


def test_an_upstream_that_refuses_a_call_without_key_is_reachable(own_upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=own_upstream.url) as proxy:
        answer = proxy.get("/status.json")
    found = answer.json()
    assert (found["upstream"]["reachable"], found["upstream"]["status"]) == (True, 401)
    assert found["upstream"]["answer_ms"] > 0
    assert 0 < found["added_ms"] < 1000
    assert answer.headers["access-control-allow-origin"] == "*"


def test_however_many_ask_the_upstream_is_asked_once_and_without_a_key(own_upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=own_upstream.url) as proxy:
        began_s = time.monotonic()
        with ThreadPoolExecutor(20) as pool:
            headers = {"Authorization": "Bearer sk-of-a-visitor", "Cookie": "a=b"}
            found = list(pool.map(lambda _: proxy.get("/status.json", headers=headers).json(), range(60)))
        probes = len({answer["checked_at"] for answer in found})
        # Once, and on a machine that is slow once more for every time that an answer has grown old.
        assert probes <= 1 + (time.monotonic() - began_s) // FRESH_S
        asked = [(request.method, request.target) for request in own_upstream.requests]
        assert asked == [("GET", "/v1/models")] * probes
        assert own_upstream.requests[0].value("authorization") is None
        # And no record tells of it: only the request that came after.
        own_upstream.script = echo
        proxy.get("/v1/files")
        assert proxy.wait_for_rows(_RECORDS, 1) == [("/v1/files",)]


@pytest.mark.parametrize("script", [_fail, _cut, _wait], ids=["fails", "breaks off", "is silent"])
def test_an_upstream_that_does_not_answer_well_is_not_reachable(own_upstream: FakeUpstream, script: object) -> None:
    own_upstream.script = script  # type: ignore[assignment]
    with LiveProxy(UPSTREAM_URL=own_upstream.url) as proxy:
        answer = proxy.get("/status.json")
        assert proxy.get("/healthz").status_code == 200
    assert answer.status_code == 200
    assert answer.json()["upstream"]["reachable"] is False


def test_nobody_at_the_upstreams_address_is_not_reachable() -> None:
    with LiveProxy(UPSTREAM_URL=f"http://127.0.0.1:{free_port()}") as proxy:
        assert proxy.get("/status.json").json()["upstream"] == {"reachable": False, "status": 0, "answer_ms": None}


def test_the_probe_goes_through_the_egress_proxy(own_upstream: FakeUpstream) -> None:
    with ConnectProxy(user="user", password="password") as egress:
        with LiveProxy(UPSTREAM_URL=own_upstream.url, UPSTREAM_PROXY=egress.url()) as proxy:
            assert proxy.get("/status.json").json()["upstream"]["reachable"] is True
        assert egress.asked_for == [("127.0.0.1", own_upstream.port)]


def test_only_reading_is_answered(own_proxy: LiveProxy) -> None:
    assert own_proxy.post("/status.json").status_code == 405
    head = own_proxy.request("HEAD", "/status.json")
    assert (head.status_code, head.content) == (200, b"")
