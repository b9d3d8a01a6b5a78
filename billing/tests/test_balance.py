"""/pro/balance, from the ledger."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from django.db import connection
from django.http import HttpRequest
from django.test import Client
from django.test.utils import CaptureQueriesContext

from billing.models import ApiKey
from billing.services import record_events
from billing.tests.routes import BEARER, ROUTES, body_of, used
from billing.tests.samples import API_KEY
from billing.views import _take_query_key

pytestmark = pytest.mark.django_db


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
