"""What two do in the admin at one moment, or one does twice: one of them wins, and the other one is told."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
from django.conf import settings as project
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.db import connection, connections, transaction
from django.test import Client
from django.utils import timezone

from billing import keys, services
from billing.models import ApiKey, Grant, GrantToken, UsageRecord
from billing.services import record_events
from billing.tests.samples import API_KEY, event

pytestmark = pytest.mark.django_db(transaction=True)
KEYS = 7
AT_ONCE = 6
FINGERPRINT = keys.fingerprint(API_KEY.encode(), pepper=project.KEY_PEPPER.encode())
NEW_KEY = {"api_key": API_KEY, "label": "of Anna", "owner": "", "price_factor": "1"}

only_on_postgresql = pytest.mark.skipif(
    "postgresql" not in str(project.DATABASES["default"]["ENGINE"]), reason="SQLite has one writer at a time"
)


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(get_user_model().objects.create_superuser("operator", password="-"))
    client.defaults["HTTP_ACCEPT_LANGUAGE"] = "en"
    return client


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    def run(call: Callable[[], Any]) -> Any:
        try:
            return call()
        finally:
            connections.close_all()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(120) for future in [pool.submit(run, call) for call in calls]]


def wait_until_one_waits() -> None:
    """Return once a transaction of this database's waits for another one's row."""
    deadline = time.monotonic() + 60
    with connection.cursor() as cursor:
        waiting = 0
        while not waiting and time.monotonic() < deadline:
            cursor.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted")
            (waiting,) = cursor.fetchone()
    assert waiting


def many_grants(operator: Client) -> dict[str, Any]:
    """Return what the page that asks sends, of all keys."""
    record_events([event(key=f"k{number}", at=timezone.now()) for number in range(KEYS)])
    asked = {"action": "grant", "_selected_action": [str(key.pk) for key in ApiKey.objects.all()]}
    page = operator.post("/admin/billing/apikey/", asked).content.decode()
    (token,) = re.findall(r'<input type="hidden" name="token" value="([0-9a-f-]{36})"', page)
    return asked | {"confirmed": "yes", "amount_usd": "5", "reason": "paid", "token": token}


def test_a_form_that_is_sent_twice_gives_many_keys_their_grants_once(operator: Client) -> None:
    form = many_grants(operator)
    assert "7 grants given." in said(operator.post("/admin/billing/apikey/", form, follow=True))
    assert "These grants have been given already." in said(operator.post("/admin/billing/apikey/", form, follow=True))
    assert Grant.objects.count() == LogEntry.objects.count() == KEYS
    entry = LogEntry.objects.first()
    assert entry is not None
    assert '"amount_usd": ["", "5"]' in entry.change_message
    # Another page gives them once more.
    operator.post("/admin/billing/apikey/", form | {"token": "0" * 32})
    assert Grant.objects.count() == 2 * KEYS


def test_a_form_that_is_sent_many_times_at_once_gives_many_keys_their_grants_once(operator: Client) -> None:
    form, cookies = many_grants(operator), operator.cookies
    barrier = threading.Barrier(AT_ONCE)

    def send() -> int:
        client = Client(headers={"Accept-Language": "en"})
        client.cookies = cookies
        barrier.wait(60)
        return client.post("/admin/billing/apikey/", form).status_code

    assert in_threads(*[send] * AT_ONCE) == [302] * AT_ONCE
    assert Grant.objects.count() == LogEntry.objects.count() == KEYS


@only_on_postgresql
def test_grants_to_many_keys_are_given_by_the_second_click_if_the_first_one_fails(operator: Client) -> None:
    form = many_grants(operator)
    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic():
            GrantToken.objects.create(token=form["token"])
            sent = pool.submit(in_threads, lambda: operator.post("/admin/billing/apikey/", form).status_code)
            wait_until_one_waits()
            assert not Grant.objects.exists()
            transaction.set_rollback(True)
        assert sent.result(60) == [302]
    assert Grant.objects.count() == KEYS


def test_a_grant_is_given_once_by_a_form_that_is_sent_twice(operator: Client) -> None:
    page = operator.get("/admin/billing/grant/add/").content.decode()
    (token,) = re.findall(r'<input type="hidden" name="token" value="([0-9a-f-]{36})"', page)
    form = {"api_key": API_KEY, "amount_usd": "5", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00"}
    assert operator.post("/admin/billing/grant/add/", form | {"token": token}).status_code == 302
    again = operator.post("/admin/billing/grant/add/", form | {"token": token})
    assert (again.status_code, "This grant has been given already." in again.content.decode()) == (200, True)
    assert [grant.amount_usd for grant in Grant.objects.all()] == [Decimal(5)]


def said(response: Any) -> str:
    return " ".join(str(message) for message in response.context["messages"])


# A key that is entered in the moment of its first use


@only_on_postgresql
def test_a_key_that_a_gateway_makes_known_while_it_is_entered_is_known_already(operator: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic():
            record_events([event(at=timezone.now(), key_fingerprint=FINGERPRINT)])
            sent = pool.submit(in_threads, lambda: operator.post("/admin/billing/apikey/add/", NEW_KEY))
            wait_until_one_waits()
        (response,) = sent.result(60)
    page = response.content.decode()
    assert (response.status_code, "This key is known already." in page, API_KEY in page) == (200, True, False)
    assert (ApiKey.objects.get().label, UsageRecord.objects.get().key) == ("", ApiKey.objects.get())


@only_on_postgresql
def test_a_request_whose_key_is_entered_while_it_is_recorded_is_that_keys(operator: Client) -> None:
    def enter() -> None:
        key = ApiKey(fingerprint=FINGERPRINT, hint="sk-…ghij", label="of Anna", registered=True)
        services.save_policy(key)

    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic():
            enter()
            used = event(at=timezone.now(), key_fingerprint=FINGERPRINT)
            recorded = pool.submit(in_threads, lambda: record_events([used]))
            wait_until_one_waits()
        (result,) = recorded.result(60)
    key = ApiKey.objects.get()
    assert (result.recorded, key.label, key.registered, key.first_used_at is not None) == (1, "of Anna", True, True)
    assert UsageRecord.objects.get().key == key
