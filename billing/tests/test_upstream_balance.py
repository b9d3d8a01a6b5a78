"""BALANCE_SOURCE=upstream: /pro/balance, asked of the upstream."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
import tracemalloc
import zlib
from typing import Any

import pytest
import trustme
from django.db import connections
from django.test import Client
from django.utils import timezone
from pytest_django import Settings

from billing.tests.routes import BEARER, DAY, body_of
from billing.tests.samples import API_KEY
from billing.upstream_balance import UpstreamBalanceError, fetch_balance
from gateway.tests.fake_upstream import Exchange, FakeUpstream

pytestmark = pytest.mark.django_db
MIB = 1024 * 1024


async def _billing_upstream(exchange: Exchange) -> None:
    answers = {"subscription": {"hard_limit_usd": 120.0}, "usage": {"total_usage": 4567.89}}
    name = exchange.request.target.split("?")[0].rpartition("/")[2]
    await exchange.answer(json.dumps(answers[name]).encode())


@pytest.fixture
def balance_upstream(settings: Settings) -> Any:
    with FakeUpstream(_billing_upstream) as upstream:
        settings.BALANCE_SOURCE, settings.UPSTREAM_URL = "upstream", upstream.url
        yield upstream


def test_the_upstreams_balance_is_asked_with_the_callers_key(client: Client, balance_upstream: FakeUpstream) -> None:
    response = client.get(f"/pro/balance?apiKey={API_KEY}")
    assert response.status_code == 200
    assert b'"total":120.00,"balance":74.32,"used":45.68' in response.content
    asked = {request.target: request for request in balance_upstream.requests}
    today = timezone.now().date()
    assert set(asked) == {
        "/v1/dashboard/billing/subscription",
        f"/v1/dashboard/billing/usage?start_date={today - 89 * DAY}&end_date={today + DAY}",
    }
    assert {request.value("authorization") for request in asked.values()} == {f"Bearer {API_KEY}"}


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("404 Not Found", b"<html>", 502),
        ("403 Forbidden", b'{"error": {"message": "session key"}}', 502),
        ("500 Oops", b"", 502),
        ("200 OK", b"<html>hello</html>", 502),
        ("200 OK", b"[1]", 502),
        ("200 OK", b'{"hard_limit_usd": "many", "total_usage": true}', 502),
        ("200 OK", b'{"hard_limit_usd": NaN, "total_usage": NaN}', 502),
        ("200 OK", b'{"hard_limit_usd": 1e999999, "total_usage": 1}', 502),
        ("200 OK", b'{"hard_limit_usd": -1e9999999, "total_usage": 1}', 502),
        ("200 OK", b"[" * 100_000, 502),
        ("200 OK", b" " * 2_000_000, 502),
        ("401 Unauthorized", b"{}", 401),
        ("302 Found", b"", 502),
    ],
)
def test_an_upstream_without_a_balance_is_said_so(
    client: Client, balance_upstream: FakeUpstream, status: str, body: bytes, expected: int
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.answer(body, status=status, headers=(("location", "/elsewhere"),))

    balance_upstream.script = script
    response = client.get("/pro/balance", headers=BEARER | {"Accept-Language": "en"})
    assert (response.status_code, body_of(response)["code"]) == (expected, expected)
    assert "upstream" in body_of(response)["message"]


def test_an_upstream_that_hangs_up_is_a_502(client: Client, balance_upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.abort()

    balance_upstream.script = script
    assert client.get("/pro/balance", headers=BEARER).status_code == 502


@pytest.mark.django_db(transaction=True)
def test_no_connection_to_the_database_is_held_while_the_upstream_is_asked(
    client: Client, balance_upstream: FakeUpstream
) -> None:
    database, held = connections["default"], []

    async def script(exchange: Exchange) -> None:
        held.append(database.connection is not None)
        await _billing_upstream(exchange)

    balance_upstream.script = script
    assert client.get("/pro/balance", headers=BEARER).status_code == 200
    assert held == [False, False]


def test_an_upstream_that_writes_on_and_on_is_waited_for_no_longer(balance_upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        leaving = asyncio.ensure_future(exchange.wait_until_client_leaves())
        while not leaving.done():
            await exchange.chunk(b" ")
            await asyncio.wait([leaving], timeout=0.05)

    balance_upstream.script = script
    with pytest.raises(UpstreamBalanceError, match=r"no whole answer within 0\.5 s"):
        asyncio.run(fetch_balance(API_KEY, timezone.now(), timeout_s=0.5))


@pytest.mark.parametrize("coding", ["gzip", "deflate", "gzip, gzip"])
def test_an_answer_that_unpacks_to_very_much_is_not_unpacked_whole(balance_upstream: FakeUpstream, coding: str) -> None:
    packed = bytes(100 * MIB)
    for layer in coding.split(", "):
        packed = zlib.compress(packed) if layer == "deflate" else gzip.compress(packed)

    async def script(exchange: Exchange) -> None:
        await exchange.answer(packed, headers=(("content-encoding", coding),))

    balance_upstream.script = script
    tracemalloc.start()
    try:
        with pytest.raises(UpstreamBalanceError, match="too large"):
            asyncio.run(fetch_balance(API_KEY, timezone.now()))
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 10 * MIB


def test_a_key_that_no_header_can_hold_is_refused_before_it_is_sent(
    client: Client, balance_upstream: FakeUpstream
) -> None:
    for api_key in ("密钥", "sk-\r\nX-Injected: 1"):
        assert client.get("/pro/balance", {"apiKey": api_key}).status_code == 401
    assert not balance_upstream.requests


def test_an_upstream_behind_a_private_authority_is_asked_with_the_extra_ca(
    client: Client, settings: Settings, tmp_path: Any
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    settings.BALANCE_SOURCE = "upstream"
    with FakeUpstream(_billing_upstream, tls=context) as upstream:
        settings.UPSTREAM_URL = upstream.url
        assert client.get("/pro/balance", headers=BEARER).status_code == 502
        settings.UPSTREAM_CA_FILE = str(tmp_path / "ca.pem")
        assert client.get("/pro/balance", headers=BEARER).status_code == 200
