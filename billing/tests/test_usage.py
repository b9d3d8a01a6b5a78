"""/pro/usage, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import re
from decimal import Decimal

import pytest
from asgiref.sync import sync_to_async
from django.test import AsyncClient, Client
from django.utils import timezone

from billing.events import Usage
from billing.models import ApiKey
from billing.services import record_events
from billing.tests.routes import BEARER, DAY, body_of, used
from billing.tests.samples import API_KEY

pytestmark = pytest.mark.django_db


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
            "unpriced_requests": 1,
            "rows": [
                chat | {"model": "gpt-4o-mini", "cost": 0.08, "unpriced_requests": 0},
                chat | {"model": "nobody-knows-me", "cost": 0, "unpriced_requests": 1},
            ],
        },
    }


def test_costs_are_written_without_an_exponent(client: Client, key: ApiKey) -> None:
    record_events([used(model="nobody-knows-me"), used(model="gpt-4.1-nano", usage=Usage(input_tokens=3))])
    told = client.get("/pro/usage", headers=BEARER).content.decode()
    assert re.findall(r'"cost":([^,}]+)', told) == ["0.0800003", "0.0000003", "0.0800000", "0.0000000"]


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
    names = "date,model,endpoint,requests,input_tokens,cached_input_tokens,output_tokens,cost,unpriced_requests"
    assert lines[0] == names.split(",")
    assert len(lines) == 1 + 81
    assert [line[0] for line in lines[1:]] == sorted(line[0] for line in lines[1:])
    assert sum(Decimal(line[-2]) for line in lines[1:]) == Decimal("6.4")
    assert [line[-2:] for line in lines if line[-1] == "1"] == [["0.0000000", "1"]]
    assert [line[1] for line in lines if "evil" in line[1]] == ['\'＝HYPERLINK("evil")']
    # To the last day that there is.
    assert len(await csv_of("&start=9999-12-01&end=9999-12-31")) == 1
