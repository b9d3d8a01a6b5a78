"""What the balance boxes of apps ask for."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from billing.models import ApiKey
from billing.services import give_grant, record_events
from billing.tests.routes import BEARER, DASHBOARD, DAY, body_of, used

pytestmark = pytest.mark.django_db


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
