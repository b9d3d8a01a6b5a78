"""What holds for all routes that tell a key what it has used."""

from __future__ import annotations

import secrets
import uuid
from ipaddress import ip_network

import httpx2 as httpx
import pytest
from django.test import Client
from pytest_django import Settings

from billing.models import ApiKey
from billing.tests.routes import BEARER, ROUTES, body_of
from billing.tests.samples import API_KEY
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy, instance

pytestmark = pytest.mark.django_db


# From a browser, and too often


@pytest.mark.parametrize("route", ROUTES)
def test_a_browser_may_ask_from_any_origin(client: Client, key: ApiKey, route: str) -> None:
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization,content-type,x-requested-with",
    }
    preflight = client.options(route, headers=asked)
    assert preflight.status_code == 204
    assert preflight["Access-Control-Allow-Origin"] == "*"
    assert preflight["Access-Control-Allow-Headers"] == asked["Access-Control-Request-Headers"]
    assert "GET" in preflight["Access-Control-Allow-Methods"]
    for headers in (BEARER, {}):
        assert (
            client.get(route, headers=headers | {"Origin": "https://app.example"})["Access-Control-Allow-Origin"] == "*"
        )


@pytest.mark.parametrize("route", ROUTES)
def test_only_get_is_answered(key: ApiKey, route: str) -> None:
    client = Client(enforce_csrf_checks=True)
    response = client.post(route, headers=BEARER)
    assert response.status_code == 405
    assert "GET" in response.content.decode()
    assert response["Allow"] == "GET, HEAD, OPTIONS"
    assert client.head(route, headers=BEARER).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_an_address_that_asks_too_often_must_wait(client: Client, route: str, settings: Settings) -> None:
    settings.BALANCE_RATE_PER_MINUTE = 3
    answers = [client.get(route, headers={"Authorization": f"Bearer sk-{n}"}) for n in range(8)]
    assert 429 not in [answer.status_code for answer in answers[:3]]
    # At the turn of a minute the count begins anew, once.
    refusals = [answer for answer in answers if answer.status_code == 429]
    assert len(refusals) >= 2
    for refused in refusals:
        assert 1 <= int(refused["Retry-After"]) <= 60
        assert refused["Access-Control-Allow-Origin"] == "*"
        if route.startswith("/pro"):
            assert body_of(refused)["code"] == 429
        else:
            assert body_of(refused)["error"]["code"] == "rate_limit_exceeded"
    assert client.get(route, headers=BEARER, REMOTE_ADDR="192.0.2.7").status_code != 429


def test_routes_share_one_allowance(client: Client, settings: Settings) -> None:
    settings.BALANCE_RATE_PER_MINUTE = len(ROUTES)
    # Three times, because at the turn of a minute the count begins anew.
    statuses = [client.get(route, REMOTE_ADDR="192.0.2.8").status_code for _ in range(3) for route in ROUTES]
    assert 429 in statuses


def test_a_preflight_does_not_count(client: Client, key: ApiKey, settings: Settings) -> None:
    settings.BALANCE_RATE_PER_MINUTE = 2
    for _ in range(10):
        client.options("/pro/balance", headers={"Origin": "x"})
    assert client.get("/pro/balance", headers=BEARER).status_code == 200


# Through the proxy as it runs


_ENTER = """
import sys
from django.utils import timezone
from django.conf import settings
from billing import keys
from billing.events import Usage, UsageEvent
from billing.services import record_events
api_key = {api_key!r}
record_events([UsageEvent(id={id!r}, started_at=timezone.now().timestamp(), status=200, method="POST",
    key_fingerprint=keys.fingerprint(api_key.encode(), pepper=settings.KEY_PEPPER.encode()), model="gpt-4o-mini",
    endpoint="/v1/chat/completions", usage_source="upstream", usage=Usage(input_tokens=1_000_000))])
"""


def test_the_running_proxy_answers_from_its_ledger_and_logs_no_key(own_proxy: LiveProxy) -> None:
    api_key = f"sk-live-{secrets.token_hex(16)}"
    own_proxy.manage("shell", "-c", _ENTER.format(api_key=api_key, id=uuid.uuid4().hex))
    bearer = {"Authorization": f"Bearer {api_key}"}
    with httpx.Client(base_url=own_proxy.url) as client:
        balance = client.get(f"/pro/balance?apiKey={api_key}")
        assert (balance.status_code, balance.json()["data"]["used"]) == (200, 0.15)
        for prefix in ("", "/v1"):
            assert client.get(f"{prefix}/dashboard/billing/usage", headers=bearer).json()["total_usage"] == 15
            assert client.get(f"{prefix}/dashboard/billing/subscription").status_code == 401
        assert len(client.get("/pro/usage?format=csv", headers=bearer).text.splitlines()) == 2
        guess = client.get(f"/pro/balance?apiKey={api_key}x")
        assert guess.status_code == 404
    assert api_key not in own_proxy.log


def test_a_ledger_that_is_away_is_said_so_in_each_form() -> None:
    with instance() as proxy:
        proxy.environment["DATABASE_URL"] = "postgres://nobody:secret@127.0.0.1:9/none"
        proxy.start()
        pro = proxy.get("/pro/balance", headers=BEARER | {"Accept-Language": "en"})
        box = proxy.get("/v1/dashboard/billing/usage", headers=BEARER)
        log = proxy.log
    assert (pro.status_code, pro.json()["code"], pro.json()["data"]) == (503, 503, None)
    assert "ledger" in pro.json()["message"]
    assert (box.status_code, box.json()["error"]["type"]) == (503, "server_error")
    assert pro.headers["retry-after"] == box.headers["retry-after"] == "5"
    assert API_KEY not in log
    assert "secret" not in log


def test_neighbours_of_the_dashboard_still_go_to_the_upstream(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    targets = ["/v1/dashboard/billing/invoices", "/v1/dashboard/billing", "/v1/dashboard/billing/usage/"]
    with httpx.Client(base_url=own_proxy.url) as client:
        for target in targets:
            assert client.get(target).json()["target"] == target
        assert client.options("/v1/dashboard/billing/usage", headers={"Origin": "https://a.example"}).status_code == 204


# Networks


@pytest.mark.parametrize("route", ROUTES)
def test_a_key_is_told_of_from_its_networks_only(client: Client, key: ApiKey, route: str) -> None:
    key.allowed_networks = "192.0.2.0/24\n2001:db8::/32"
    key.save()
    for address in ("192.0.2.9", "::ffff:192.0.2.9", "2001:db8::1"):
        assert client.get(route, headers=BEARER, REMOTE_ADDR=address).status_code == 200, address
    for address in ("198.51.100.5", "2001:db9::1", "", "nonsense"):
        refused = client.get(route, headers=BEARER, REMOTE_ADDR=address)
        assert refused.status_code == 403, address
        assert "0.08" not in refused.content.decode()
    if route.startswith("/pro"):
        assert body_of(refused) == {"code": 403, "message": "不允许从您的网络地址使用该密钥", "data": None}
    else:
        assert body_of(refused)["error"]["code"] == "address_not_allowed"


def test_networks_of_the_settings_hold_for_keys_without_their_own(
    client: Client, key: ApiKey, settings: Settings
) -> None:
    settings.ALLOWED_NETWORKS = (ip_network("192.0.2.0/24"),)
    assert client.get("/pro/balance", headers=BEARER, REMOTE_ADDR="198.51.100.5").status_code == 403
    assert client.get("/pro/balance", headers=BEARER, REMOTE_ADDR="192.0.2.9").status_code == 200
    key.allowed_networks = "198.51.100.0/24"
    key.save()
    assert client.get("/pro/balance", headers=BEARER, REMOTE_ADDR="198.51.100.5").status_code == 200
