from __future__ import annotations

import csv
import datetime as dt
import io
import warnings
from decimal import Decimal
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import AsyncClient, Client
from django.utils import timezone

from billing.models import ApiKey, ModelPrice, UsageDay
from billing.services import block_key, give_grant, record_events
from billing.tests.samples import event

pytestmark = pytest.mark.django_db
LISTS = ("apikey", "grant", "usagerecord", "usageday", "modelprice", "purge")


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(get_user_model().objects.create_superuser("operator"))
    return client


def exported(client: Client, url: str) -> list[dict[str, str]]:
    response: Any = client.get(url)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "text/csv; charset=utf-8")
    assert "attachment" in response.headers["Content-Disposition"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this client reads an asynchronous answer at once
        text = b"".join(response).decode("utf-8-sig")
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("model", LISTS)
def test_every_list_is_exported(operator: Client, model: str) -> None:
    record_events([event(at=timezone.now())])
    give_grant(ApiKey.objects.get(), Decimal(1))
    ModelPrice.objects.create(model="m", valid_from=timezone.now(), input=1)
    assert len(exported(operator, f"/admin/billing/{model}/export/")) == (0 if model == "purge" else 1)


def test_keys_are_exported_with_their_balances_as_they_are_filtered(operator: Client) -> None:
    record_events([event(key=f"k{n}", at=timezone.now()) for n in range(30)])
    blocked, *_others = ApiKey.objects.order_by("pk")
    give_grant(blocked, Decimal("12.50"))
    block_key(blocked)
    assert len(exported(operator, "/admin/billing/apikey/export/")) == 30
    (row,) = exported(operator, "/admin/billing/apikey/export/?blocked__exact=1")
    assert (row["fingerprint"], row["blocked"]) == (blocked.fingerprint, "true")
    assert (row["granted_usd"], row["used_usd"], row["balance_usd"]) == ("12.50", "0.00", "12.50")


def test_records_are_exported_beyond_the_first_page_and_by_filter(operator: Client) -> None:
    record_events([event(at=timezone.now(), model="m" if n % 2 else "gpt-4o-mini") for n in range(90)])
    assert len(exported(operator, "/admin/billing/usagerecord/export/")) == 90
    rows = exported(operator, "/admin/billing/usagerecord/export/?model=m")
    assert {row["model"] for row in rows} == {"m"}
    assert len(rows) == 45


@pytest.mark.parametrize("query", ["?key=team", "?q=team"])
def test_all_that_many_keys_used_is_exported(operator: Client, query: str) -> None:
    record_events([event(key=f"k{n}", at=timezone.now()) for n in range(60)])
    ApiKey.objects.exclude(pk=ApiKey.objects.latest("pk").pk).update(label="Team")
    assert len(exported(operator, f"/admin/billing/usagerecord/export/{query}")) == 59
    assert len(exported(operator, "/admin/billing/usageday/export/?key=team")) == 59


@pytest.mark.parametrize(
    ("model", "query"), [("apikey", "?blocked__exact=bad"), *((model, "?utm=1") for model in LISTS)]
)
def test_what_no_list_can_be_filtered_by_leads_back_to_the_list(operator: Client, model: str, query: str) -> None:
    answer = operator.get(f"/admin/billing/{model}/export/{query}", follow=True)
    assert answer.status_code == 200
    assert (answer.request["PATH_INFO"], answer.request["QUERY_STRING"]) == (f"/admin/billing/{model}/", "e=1")


def test_an_export_is_of_all_pages_and_reads_none(operator: Client, django_assert_max_num_queries: Any) -> None:
    record_events([event(key=f"k{n}", at=timezone.now()) for n in range(30)])
    with django_assert_max_num_queries(8):
        assert len(exported(operator, "/admin/billing/apikey/export/?p=99")) == 30


def test_the_button_carries_the_filters(operator: Client) -> None:
    page = operator.get("/admin/billing/apikey/?blocked__exact=1&q=a").content.decode()
    assert "/admin/billing/apikey/export/?blocked__exact=1&amp;q=a" in page


@pytest.mark.parametrize("label", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_runs_nothing_of_what_a_text_says(operator: Client, label: str) -> None:
    record_events([event(at=timezone.now())])
    ApiKey.objects.update(label=label)
    (row,) = exported(operator, "/admin/billing/apikey/export/")
    assert row["label"] == f"'{label}"


def test_an_amount_below_zero_stays_a_number(operator: Client) -> None:
    record_events([event(at=timezone.now(), model="gpt-4o") for _ in range(20)])
    (row,) = exported(operator, "/admin/billing/apikey/export/")
    assert Decimal(row["balance_usd"]) < 0


def test_who_may_not_export_neither_sees_the_button_nor_gets_the_list(client: Client) -> None:
    user = get_user_model().objects.create_user("support", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_apikey"))
    client.force_login(user)
    page = client.get("/admin/billing/apikey/")
    assert page.status_code == 200
    assert "/export/" not in page.content.decode()
    assert client.get("/admin/billing/apikey/export/").status_code == 403
    user.user_permissions.add(Permission.objects.get(codename="export_lists"))
    client.force_login(get_user_model().objects.get(pk=user.pk))
    assert client.get("/admin/billing/apikey/export/").status_code == 200
    assert client.get("/admin/billing/grant/export/").status_code == 403


@pytest.mark.django_db(transaction=True)
async def test_rows_leave_in_pieces(async_client: AsyncClient) -> None:
    user = await get_user_model().objects.acreate(username="operator", is_staff=True, is_superuser=True)
    await async_client.aforce_login(user)
    await ApiKey.objects.abulk_create([ApiKey(fingerprint=f"{number:064x}", hint="sk-…1234") for number in range(1100)])
    response: Any = await async_client.get("/admin/billing/apikey/export/")
    pieces = [piece async for piece in response.streaming_content]
    assert len(pieces) == 4  # the names, and 500 rows at a time
    assert b"".join(pieces).count(b"\n") == 1101


@pytest.mark.django_db(transaction=True)
async def test_no_connection_is_held_between_two_pieces_and_no_key_that_moves_is_left_out(
    async_client: AsyncClient,
) -> None:
    user = await get_user_model().objects.acreate(username="operator", is_staff=True, is_superuser=True)
    await async_client.aforce_login(user)
    used_at = timezone.now()
    await ApiKey.objects.abulk_create(
        [
            ApiKey(fingerprint=f"{number:064x}", hint="sk-…1234", last_used_at=used_at - dt.timedelta(minutes=number))
            for number in range(1100)
        ]
    )
    response: Any = await async_client.get("/admin/billing/apikey/export/")
    pieces = response.streaming_content
    text, held = b"", []
    async for piece in pieces:
        text += piece
        held.append(await sync_to_async(lambda: connection.connection is not None)())
        if len(held) == 2:  # the names, and the first 500: now one is at their front that was behind them all
            await ApiKey.objects.filter(fingerprint=f"{1099:064x}").aupdate(
                last_used_at=used_at + dt.timedelta(minutes=1)
            )
    assert not any(held[1:])
    rows = csv.DictReader(io.StringIO(text.decode("utf-8-sig")))
    assert [int(row["fingerprint"], 16) for row in rows] == list(range(1100))


@pytest.mark.parametrize("filters", ["", "?period=29", "?key=sk", "?trouble=completed"])
def test_records_of_many_pieces_are_all_there_newest_first(operator: Client, filters: str) -> None:
    now = timezone.now()
    record_events([event(at=now - dt.timedelta(seconds=number // 7), model="gpt-4o-mini") for number in range(4500)])
    rows = exported(operator, f"/admin/billing/usagerecord/export/{filters}")
    assert len({row["event_id"] for row in rows}) == len(rows) == 4500
    assert all(row["started_at"] for row in rows)


def test_days_of_many_pieces_are_all_there_newest_first(operator: Client) -> None:
    key = ApiKey.objects.create(fingerprint="1" * 64, hint="sk-…1234")
    today = timezone.now().date()
    UsageDay.objects.bulk_create(
        UsageDay(key=key, day=today - dt.timedelta(days=number % 3), model=f"m{number}", endpoint="/v1/x")
        for number in range(4500)
    )
    rows = exported(operator, "/admin/billing/usageday/export/")
    assert len({row["model"] for row in rows}) == len(rows) == 4500
    assert [row["day"] for row in rows] == sorted((row["day"] for row in rows), reverse=True)
