from __future__ import annotations

import csv
import datetime as dt
import io
import json
import logging
import secrets
import ssl
import uuid
from decimal import Decimal
from ipaddress import ip_network
from typing import Any

import httpx2 as httpx
import pytest
import trustme
from asgiref.sync import sync_to_async
from django.conf import settings as project
from django.db import connection
from django.http import HttpRequest
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from billing import keys
from billing.events import Usage
from billing.models import ApiKey
from billing.services import give_grant, record_events
from billing.tests.samples import API_KEY, event
from billing.views import _take_query_key
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy

pytestmark = pytest.mark.django_db
DAY = dt.timedelta(days=1)
BEARER = {"Authorization": f"Bearer {API_KEY}"}
DASHBOARD = [
    f"{prefix}/dashboard/billing/{name}"
    for prefix in ("", "/v1")
    for name in ("subscription", "usage", "credit_grants")
]
ROUTES = ["/pro/balance", "/pro/usage", *DASHBOARD]


def used(**given: Any) -> Any:
    """Return an event of API_KEY today that cost 8 US cents: 800,000 tokens of input and cached input."""
    fingerprint = keys.fingerprint(API_KEY.encode(), pepper=project.KEY_PEPPER.encode())
    usage = Usage(input_tokens=500_000, cached_input_tokens=66_667)
    return event(**{"at": timezone.now(), "key_fingerprint": fingerprint, "usage": usage} | given)


@pytest.fixture
def key() -> ApiKey:
    """API_KEY in the ledger: 18 USD granted, 0.0800000 used today."""
    record_events([used()])
    found = ApiKey.objects.get()
    give_grant(found, Decimal(18))
    return found


def body_of(response: Any) -> Any:
    return json.loads(response.content)


# /pro/balance


def test_a_balance_has_the_shape_of_the_original_service(client: Client, key: ApiKey) -> None:
    response = client.get(f"/pro/balance?apiKey={API_KEY}")
    assert response.status_code == 200
    assert response.content.decode() == (
        '{"code":200,"message":"执行成功","data":{"total":18.00,"balance":17.92,"used":0.08}}'
    )
    assert response["Content-Type"] == "application/json; charset=utf-8"
    assert response["Cache-Control"] == "no-store"


def test_a_balance_is_there_for_a_key_in_the_header(client: Client, key: ApiKey) -> None:
    assert body_of(client.get("/pro/balance", headers=BEARER))["data"]["balance"] == 17.92


def test_an_overdrawn_key_has_a_negative_balance(client: Client) -> None:
    record_events([used()])
    response = client.get("/pro/balance", headers=BEARER)
    assert b'"total":0.00,"balance":-0.08,"used":0.08' in response.content


@pytest.mark.parametrize(
    ("language", "expected"),
    [(None, "执行成功"), ("en-US,en;q=0.9", "Success"), ("fr", "执行成功"), ("zh-TW", "执行成功")],
)
def test_the_message_is_chinese_unless_english_is_asked_for(
    client: Client, key: ApiKey, language: str | None, expected: str
) -> None:
    headers = BEARER | ({"Accept-Language": language} if language else {})
    assert body_of(client.get("/pro/balance", headers=headers))["message"] == expected


@pytest.mark.parametrize("query", ["", "?apiKey=", "?apiKey=%20"])
def test_a_missing_key_is_a_400(client: Client, query: str) -> None:
    response = client.get(f"/pro/balance{query}", headers={"Accept-Language": "en"})
    assert response.status_code == 400
    assert body_of(response)["code"] == 400
    assert body_of(response)["data"] is None
    assert "missing" in body_of(response)["message"]


@pytest.mark.parametrize("guess", ["sk-guess", "密钥", "a" * 5000, "%00", "%ff%fe", "'; --"])
def test_a_key_never_seen_is_a_404(client: Client, key: ApiKey, guess: str) -> None:
    response = client.get("/pro/balance", {"apiKey": guess})
    assert (response.status_code, body_of(response)["code"]) == (404, 404)
    assert "没有" in body_of(response)["message"]


def test_a_known_and_an_unknown_key_cost_the_same_queries(client: Client, key: ApiKey) -> None:
    for route in ROUTES:
        counts = []
        for api_key in (API_KEY, "sk-guess"):
            with CaptureQueriesContext(connection) as queries:
                client.get(route, headers={"Authorization": f"Bearer {api_key}"})
            counts.append(len(queries))
        assert counts[0] == counts[1] <= 5, route


def test_the_key_is_taken_out_of_the_request(rf: Any) -> None:
    request: HttpRequest = rf.get("/pro/balance", {"apiKey": API_KEY, "x": "1"})
    assert _take_query_key(request) == API_KEY
    assert API_KEY not in repr(request) + repr(request.GET) + repr(request.META) + request.get_full_path()


def test_no_log_ever_holds_the_key(client: Client, key: ApiKey, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client.raise_request_exception = False
    with connection.execute_wrapper(_fail):
        assert client.get(f"/pro/balance?apiKey={API_KEY}").status_code == 500
    client.get(f"/pro/balance?apiKey={API_KEY}")
    client.get("/pro/balance?apiKey=sk-guess-0123456789")
    assert caplog.records
    for record in caplog.records:
        shown = record.getMessage() + repr(record.__dict__)
        assert API_KEY not in shown
        assert "sk-guess" not in shown


def _fail(*args: Any) -> Any:
    raise RuntimeError("the database is in flames")


# /pro/usage


def test_usage_lists_the_days_of_the_key(client: Client, key: ApiKey) -> None:
    record_events([used(model="nobody-knows-me"), used(key_fingerprint="f" * 64), used(at=timezone.now() - 90 * DAY)])
    answer = body_of(client.get("/pro/usage", headers=BEARER))
    today = timezone.now().date().isoformat()
    chat = {"date": today, "endpoint": "/v1/chat/completions", "requests": 1, "output_tokens": 0}
    chat |= {"input_tokens": 500_000, "cached_input_tokens": 66_667}
    assert answer == {
        "code": 200,
        "message": "执行成功",
        "data": {
            "cost": 0.08,
            "rows": [chat | {"model": "gpt-4o-mini", "cost": 0.08}, chat | {"model": "nobody-knows-me", "cost": 0}],
        },
    }


def test_usage_keeps_to_the_dates_both_inclusive(client: Client) -> None:
    today = timezone.now().date()
    record_events([used(at=timezone.now() - DAY * age) for age in (0, 1, 2, 3, 200)])
    query = {"start": (today - 2 * DAY).isoformat(), "end": (today - DAY).isoformat()}
    rows = body_of(client.get("/pro/usage", query, headers=BEARER))["data"]["rows"]
    assert [row["date"] for row in rows] == list(query.values())
    old = body_of(client.get("/pro/usage", {"end": (today - 200 * DAY).isoformat()}, headers=BEARER))
    assert len(old["data"]["rows"]) == 1


def test_an_end_alone_means_as_many_days_up_to_it(client: Client) -> None:
    today = timezone.now().date()
    record_events([used(at=timezone.now() - DAY * age) for age in (99, 100, 189, 190)])
    rows = body_of(client.get("/pro/usage", {"end": (today - 100 * DAY).isoformat()}, headers=BEARER))["data"]["rows"]
    assert [row["date"] for row in rows] == [(today - DAY * age).isoformat() for age in (189, 100)]
    assert body_of(client.get("/pro/usage", {"end": "0001-01-02"}, headers=BEARER))["data"]["rows"] == []


@pytest.mark.parametrize(
    "query",
    [
        {"start": "yesterday"},
        {"end": "2026-13-01"},
        {"start": "2026-02-01", "end": "2026-01-01"},
        {"start": "2020-01-01"},
        {"start": "20260101", "end": "20260102"},
        {"start": "2026-W01-1", "end": "2026-01-02"},
        {"start": "2026-1-1", "end": "2026-1-2"},
        {"end": "9999-12-31"},
    ],
)
def test_dates_that_make_no_sense_are_a_400(client: Client, key: ApiKey, query: dict[str, str]) -> None:
    response = client.get("/pro/usage", query, headers=BEARER)
    assert (response.status_code, body_of(response)["code"]) == (400, 400)
    assert "YYYY-MM-DD" in body_of(response)["message"]


def test_usage_without_a_key_is_a_400_and_of_an_unknown_one_a_404(client: Client, key: ApiKey) -> None:
    assert client.get(f"/pro/usage?apiKey={API_KEY}").status_code == 400
    for query in ("", "?format=csv"):
        assert client.get(f"/pro/usage{query}", headers={"Authorization": "Bearer sk-guess"}).status_code == 404


async def csv_of(query: str = "") -> list[list[str]]:
    response = await AsyncClient().get(f"/pro/usage?format=csv{query}", headers=BEARER)
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert response.streaming
    text = b"".join([part async for part in response]).decode()  # type: ignore[attr-defined]
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.django_db(transaction=True)
async def test_usage_is_streamed_as_csv() -> None:
    events = [used(at=timezone.now() - DAY * age) for age in range(80)]
    await sync_to_async(record_events)([*events, used(model='＝HYPERLINK("evil")')])
    lines = await csv_of()
    assert ",".join(lines[0]) == "date,model,endpoint,requests,input_tokens,cached_input_tokens,output_tokens,cost"
    assert len(lines) == 1 + 81
    assert [line[0] for line in lines[1:]] == sorted(line[0] for line in lines[1:])
    assert sum(Decimal(line[-1]) for line in lines[1:]) == Decimal("6.4")
    assert [line[1] for line in lines if "evil" in line[1]] == ['\'＝HYPERLINK("evil")']
    # To the last day that there is.
    assert len(await csv_of("&start=9999-12-01&end=9999-12-31")) == 1


# The apps' balance boxes


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_the_boxes_of_the_apps_show_the_ledger(client: Client, key: ApiKey, prefix: str) -> None:
    subscription = body_of(client.get(f"{prefix}/dashboard/billing/subscription", headers=BEARER))
    assert subscription["object"] == "billing_subscription"
    assert subscription["has_payment_method"] is True
    assert {subscription[f"{kind}_limit_usd"] for kind in ("hard", "soft", "system_hard")} == {18}
    assert subscription["access_until"] > timezone.now().timestamp()

    usage = body_of(client.get(f"{prefix}/dashboard/billing/usage", headers=BEARER))
    assert (usage["object"], usage["total_usage"]) == ("list", 8)
    (day,) = usage["daily_costs"]
    assert day["line_items"] == [{"name": "gpt-4o-mini", "cost": 8}]
    assert dt.datetime.fromtimestamp(day["timestamp"], dt.UTC).date() == timezone.now().date()

    credit = body_of(client.get(f"{prefix}/dashboard/billing/credit_grants", headers=BEARER))
    assert credit["object"] == "credit_summary"
    assert [credit[f"total_{kind}"] for kind in ("granted", "used", "available")] == [18, 0.08, 17.92]
    (grant,) = credit["grants"]["data"]
    assert (grant["grant_amount"], grant["used_amount"]) == (18, 0.08)


def test_grants_that_end_first_are_used_first(client: Client, key: ApiKey) -> None:
    until = timezone.now() + DAY
    give_grant(key, Decimal("0.05"), valid_until=until)
    credit = body_of(client.get("/dashboard/billing/credit_grants", headers=BEARER))
    assert [grant["used_amount"] for grant in credit["grants"]["data"]] == [0.05, 0.03]
    assert credit["grants"]["data"][0]["expires_at"] == int(until.timestamp())
    subscription = body_of(client.get("/dashboard/billing/subscription", headers=BEARER))
    assert subscription["access_until"] > until.timestamp() + 86400


def test_access_ends_with_the_last_grant(client: Client) -> None:
    record_events([used()])
    until = timezone.now() + 30 * DAY
    give_grant(ApiKey.objects.get(), Decimal(1), valid_until=until)
    subscription = body_of(client.get("/dashboard/billing/subscription", headers=BEARER))
    assert subscription["access_until"] == int(until.timestamp())


def cents_of(client: Client, query: dict[str, str]) -> Any:
    return body_of(client.get("/v1/dashboard/billing/usage", query, headers=BEARER))["total_usage"]


def test_the_dates_of_the_boxes_are_honoured(client: Client) -> None:
    today = timezone.now().date()
    record_events([used(at=timezone.now() - DAY * age) for age in (0, 5, 10, 100)])
    day = {age: (today - DAY * age).isoformat() for age in (-1, 0, 5, 10, 100)}
    assert cents_of(client, {"start_date": day[5], "end_date": day[-1]}) == 16
    assert cents_of(client, {"start_date": day[10], "end_date": day[5]}) == 16
    assert cents_of(client, {"start_date": day[100]}) == 32
    assert cents_of(client, {"end_date": day[5]}) == 16
    # An end on today must not lose today, whatever the app means by it.
    assert cents_of(client, {"start_date": day[0], "end_date": day[0]}) == 8


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"start_date": "", "end_date": ""},
        {"start_date": "null", "end_date": "undefined"},
        {"start_date": "2026-02-31", "end_date": "9999-99-99"},
        {"end_date": "2999-01-01T00:00:00Z"},
    ],
)
def test_dates_may_be_missing_or_make_no_sense(client: Client, key: ApiKey, query: dict[str, str]) -> None:
    assert cents_of(client, query) == 8


def test_unpadded_dates_are_read(client: Client, key: ApiKey) -> None:
    assert cents_of(client, {"start_date": "2020-1-1", "end_date": "2020-2-1"}) == 0


@pytest.mark.parametrize("route", DASHBOARD)
@pytest.mark.parametrize("header", [None, "Bearer sk-guess", "Bearer", "Basic abc", "Bearer a b"])
def test_a_missing_or_unknown_key_is_openais_401(client: Client, key: ApiKey, route: str, header: str | None) -> None:
    response = client.get(route, headers={"Authorization": header} if header else {})
    assert response.status_code == 401
    error = body_of(response)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "sk-guess" not in error["message"]


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


# BALANCE_SOURCE=upstream


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
    with LiveProxy() as proxy:
        proxy.stop()
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
