from __future__ import annotations

import logging
import re
from decimal import Decimal
from typing import Any

import pytest
from django.conf import settings as project
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.translation import override
from pytest_django import DjangoCaptureOnCommitCallbacks

from billing import keys
from billing.admin.audit import values_in
from billing.models import ApiKey, Grant, ModelPrice, PriceSource, Purge, UsageDay, UsageRecord
from billing.seeding import seed_usage
from billing.services import block_key, give_grant, record_events, revoke_grant
from billing.tests.samples import API_KEY, event

pytestmark = pytest.mark.django_db
MODELS = ("apikey", "grant", "usagerecord", "usageday", "modelprice", "purge")


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(get_user_model().objects.create_superuser("operator"))
    return client


@pytest.fixture
def key() -> ApiKey:
    record_events([event(at=timezone.now()), event(at=timezone.now(), model="nobody-knows-me")])
    return ApiKey.objects.get()


def queries_of(client: Client, url: str) -> list[str]:
    with CaptureQueriesContext(connection) as queries:
        assert client.get(url).status_code == 200
    return [query["sql"] for query in queries]


@pytest.mark.parametrize("model", MODELS)
def test_every_page_is_there_and_empty_at_first(operator: Client, model: str) -> None:
    assert operator.get(f"/admin/billing/{model}/").status_code == 200


@pytest.mark.parametrize("model", MODELS)
def test_a_list_takes_as_many_queries_with_more_rows(operator: Client, model: str) -> None:
    counts = []
    for days in (1, 3):
        seed_usage(10 * days, keys=5 * days, days=days, until=timezone.now().date(), seed=days)
        ModelPrice.objects.create(model=f"m{days}", valid_from=timezone.now(), input=1)
        Purge.objects.create(before=timezone.now().date().replace(year=2000))
        counts.append(len(queries_of(operator, f"/admin/billing/{model}/")))
        UsageRecord.objects.all()._raw_delete("default")
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize("model", ["usagerecord", "usageday"])
@pytest.mark.parametrize("query", ["", "?p=2", "?period=6", "?trouble=unpriced", "?trouble=timeout", "?q=Seed"])
def test_big_tables_are_never_counted(operator: Client, model: str, query: str) -> None:
    seed_usage(200, keys=3, days=3, until=timezone.now().date())
    if model == "usageday" and query not in ("", "?p=2", "?period=6"):
        query = ""
    assert not [sql for sql in queries_of(operator, f"/admin/billing/{model}/{query}") if "COUNT(" in sql]


def test_a_record_is_shown_and_cannot_be_changed(operator: Client, key: ApiKey) -> None:
    record = UsageRecord.objects.filter(cost_usd=None).get()
    page = operator.get("/admin/billing/usagerecord/").content.decode()
    assert "unpriced" in page or "0.000465" in page
    url = f"/admin/billing/usagerecord/{record.pk}"
    assert operator.get(f"{url}/change/").status_code == 200
    assert operator.post(f"{url}/change/", {"model": "x"}).status_code == 403
    assert operator.post(f"{url}/delete/", {"post": "yes"}).status_code == 403
    assert operator.get("/admin/billing/usagerecord/add/").status_code == 403


@pytest.mark.parametrize(("query", "shown"), [("sk-…wxyz", 2), ("000", 0), ("{id}", 1), ("{fingerprint}", 2)])
def test_records_are_found_by_key_or_by_id(operator: Client, key: ApiKey, query: str, shown: int) -> None:
    query = query.format(id=UsageRecord.objects.first(), fingerprint=key.fingerprint)
    response = operator.get("/admin/billing/usagerecord/", {"q": query})
    assert len(response.context["cl"].result_list) == shown


def test_a_keys_list_shows_its_balance(operator: Client, key: ApiKey) -> None:
    give_grant(key, Decimal(18))
    page = operator.get("/admin/billing/apikey/").content.decode()
    assert "18.00" in page
    assert key.hint in page
    assert operator.get(f"/admin/billing/apikey/{key.pk}/change/").status_code == 200


def test_keys_are_blocked_and_unblocked_from_their_list_and_it_is_logged(operator: Client, key: ApiKey) -> None:
    for action, is_blocked in (("block", True), ("unblock", False)):
        given: dict[str, Any] = {"action": action, "_selected_action": [key.pk]}
        question = operator.post("/admin/billing/apikey/", given)
        assert str(key) in question.content.decode()
        key.refresh_from_db()
        assert key.blocked is not is_blocked
        assert operator.post("/admin/billing/apikey/", given | {"confirmed": "yes"}).status_code == 302
        key.refresh_from_db()
        assert key.blocked is is_blocked
        entry = LogEntry.objects.latest("pk")
        assert (entry.object_id, entry.user.username) == (str(key.pk), "operator")
        with override("en"):
            assert values_in(entry) == [("blocked", "No", "Yes") if is_blocked else ("blocked", "Yes", "No")]
    assert operator.get("/admin/billing/apikey/?blocked__exact=0").status_code == 200


def test_many_keys_are_blocked_before_the_first_word_of_it_to_redis(
    operator: Client, key: ApiKey, django_capture_on_commit_callbacks: DjangoCaptureOnCommitCallbacks
) -> None:
    record_events([event(at=timezone.now(), key=f"k{n}") for n in range(2)])
    given = {"action": "block", "_selected_action": ApiKey.objects.values_list("pk", flat=True), "confirmed": "yes"}
    with django_capture_on_commit_callbacks() as announcements:
        operator.post("/admin/billing/apikey/", given)
    assert ApiKey.objects.filter(blocked=True).count() == 3
    assert len(announcements) == 1


def test_the_first_page_shows_who_is_blocked(operator: Client, key: ApiKey) -> None:
    block_key(key)
    response = operator.get("/admin/billing/apikey/", headers={"Accept-Language": "en"})
    assert ">blocked</strong>" in response.content.decode()


# The pasted key


def grant_form(**given: Any) -> dict[str, Any]:
    now = timezone.now()
    dates = {"valid_from_0": f"{now:%Y-%m-%d}", "valid_from_1": f"{now:%H:%M:%S}"}
    return {"amount_usd": "12.5", "reason": "paid", "valid_until_0": "", "valid_until_1": ""} | dates | given


def everything_stored() -> str:
    """Return every row of every table of ours, and of the admin's log, as text."""
    models = (ApiKey, Grant, LogEntry, UsageRecord, UsageDay, ModelPrice)
    return repr([list(model.objects.values()) for model in models])


def test_a_pasted_key_becomes_a_grant_and_is_forgotten(operator: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    response = operator.post("/admin/billing/grant/add/", grant_form(api_key=f"  {API_KEY} "), follow=True)
    grant = Grant.objects.get()
    assert grant.key.fingerprint == keys.fingerprint(API_KEY.encode(), pepper=project.KEY_PEPPER.encode())
    assert (grant.key.hint, grant.amount_usd) == ("sk-…ghij", Decimal("12.5"))
    assert grant.given_by == get_user_model().objects.get()
    for place in (response.content.decode(), everything_stored(), caplog.text):
        assert API_KEY not in place


@pytest.mark.parametrize(
    "given",
    [
        {"api_key": API_KEY, "amount_usd": "-1"},
        {"api_key": API_KEY, "amount_usd": "99999999999"},
        {"api_key": API_KEY, "valid_until_0": "2001-01-01", "valid_until_1": "00:00:00"},
        {"api_key": f"{API_KEY} and more"},
        {"api_key": f"{API_KEY}密钥"},
        {"api_key": ""},
        {"api_key": "short"},
    ],
)
def test_a_form_that_comes_back_does_not_show_the_key(operator: Client, given: dict[str, str]) -> None:
    response = operator.post("/admin/billing/grant/add/", grant_form(**given))
    assert response.status_code == 200
    assert response.context["adminform"].form.errors
    assert API_KEY not in response.content.decode()
    assert not Grant.objects.exists()
    assert not ApiKey.objects.exists()


def test_a_grant_is_for_a_known_key_or_a_pasted_one_and_not_for_both(operator: Client, key: ApiKey) -> None:
    both = operator.post("/admin/billing/grant/add/", grant_form(api_key=API_KEY, key=key.pk))
    assert both.context["adminform"].form.errors
    assert operator.post("/admin/billing/grant/add/", grant_form(key=key.pk)).status_code == 302
    assert Grant.objects.get().key == key


def test_a_key_is_entered_before_its_first_use_once(operator: Client) -> None:
    given = {"api_key": API_KEY, "label": "Anna", "owner": "anna@example.org", "price_factor": "0.9"}
    assert operator.post("/admin/billing/apikey/add/", given).status_code == 302
    entered = ApiKey.objects.get()
    assert (entered.label, entered.hint, entered.price_factor) == ("Anna", "sk-…ghij", Decimal("0.9"))
    again = operator.post("/admin/billing/apikey/add/", given)
    assert again.context["adminform"].form.errors
    assert API_KEY not in again.content.decode() + everything_stored()


def test_a_grant_is_given_from_the_keys_page_and_says_by_whom(operator: Client, key: ApiKey) -> None:
    earlier = give_grant(key, Decimal(1))
    url = f"/admin/billing/apikey/{key.pk}/change/"
    page = operator.get(url).content.decode()
    fields = dict(re.findall(r'name="(grants-[^"]*FORMS)" value="(\d+)"', page))
    new = int(fields["grants-INITIAL_FORMS"])
    fields |= {"grants-TOTAL_FORMS": str(new + 1), "label": "A", "owner": "", "price_factor": "1"}
    fields |= {f"grants-{new}-{name}": value for name, value in grant_form(key=key.pk).items()}
    fields |= {"grants-0-id": str(earlier.pk), "grants-0-key": str(key.pk), "grants-0-amount_usd": "1000"}
    assert operator.post(url, fields).status_code == 302
    given = Grant.objects.exclude(pk=earlier.pk).get()
    assert (given.amount_usd, given.given_by) == (Decimal("12.5"), get_user_model().objects.get())
    earlier.refresh_from_db()
    assert (earlier.amount_usd, earlier.given_by) == (1, None)


@pytest.mark.parametrize("named", ["abc", "9" * 30, "", "-1"])
def test_a_new_grants_address_may_name_a_key_that_cannot_be(operator: Client, key: ApiKey, named: str) -> None:
    assert operator.get("/admin/billing/grant/add/", {"key": named}).status_code == 200
    assert f'value="{key.pk}" selected' in operator.get("/admin/billing/grant/add/", {"key": key.pk}).content.decode()


def test_a_grants_amount_cannot_be_changed_but_it_can_be_revoked(operator: Client, key: ApiKey) -> None:
    grant = give_grant(key, Decimal(1), reason="a")
    url = f"/admin/billing/grant/{grant.pk}/change/"
    operator.post(url, {"amount_usd": "100", "reason": "b", "valid_until_0": "", "valid_until_1": ""})
    grant.refresh_from_db()
    assert (grant.amount_usd, grant.reason) == (1, "b")
    revoke = {"action": "revoke", "_selected_action": [grant.pk]}
    operator.post("/admin/billing/grant/", revoke)
    grant.refresh_from_db()
    assert grant.revoked_at is None
    operator.post("/admin/billing/grant/", revoke | {"confirmed": "yes"})
    grant.refresh_from_db()
    assert grant.revoked_at is not None
    assert operator.post(f"/admin/billing/grant/{grant.pk}/delete/", {"post": "yes"}).status_code == 403


def test_a_grant_that_is_edited_while_it_is_revoked_stays_revoked(rf: RequestFactory, key: ApiKey) -> None:
    given = give_grant(key, Decimal(5))
    request, pages = rf.post("/"), admin.site.get_model_admin(Grant)
    request.user = get_user_model().objects.create_superuser("operator")
    read_before = Grant.objects.get()
    form = pages.get_form(request, read_before, change=True)({"reason": "paid"}, instance=read_before)
    assert form.is_valid()
    assert revoke_grant(given)
    pages.save_model(request, form.save(commit=False), form, change=True)
    given.refresh_from_db()
    assert given.reason == "paid"
    assert given.revoked_at is not None


def test_a_grant_that_would_end_before_it_begins_is_refused_in_every_form(operator: Client, key: ApiKey) -> None:
    given = give_grant(key, Decimal(5))
    past = {"valid_until_0": "2020-01-01", "valid_until_1": "00:00"}
    many = {"action": "grant", "_selected_action": [key.pk], "confirmed": "yes", "amount_usd": "5"}
    for url, fields in ((f"/admin/billing/grant/{given.pk}/change/", {}), ("/admin/billing/apikey/", many)):
        response = operator.post(url, fields | past, headers={"Accept-Language": "en"})
        assert "A grant must end after it begins." in response.content.decode()
    assert Grant.objects.get().valid_until is None


def test_a_price_is_entered_and_rates_what_comes_next(operator: Client) -> None:
    given = {"model": "mine", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00", "input": "10", "output": "20"}
    assert operator.post("/admin/billing/modelprice/add/", given).status_code == 302
    assert ModelPrice.objects.get().created_by == get_user_model().objects.get()
    record_events([event(model="mine")])
    assert UsageRecord.objects.get().cost_usd == Decimal("0.022")


def test_a_second_price_of_one_model_and_moment_is_refused_in_the_form(operator: Client) -> None:
    given = {"model": "mine", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00", "input": "10"}
    assert operator.post("/admin/billing/modelprice/add/", given).status_code == 302
    again = operator.post("/admin/billing/modelprice/add/", given)
    assert (again.status_code, len(again.context["errors"])) == (200, 1)
    assert operator.post("/admin/billing/modelprice/add/", given | {"valid_from_0": "2026-01-02"}).status_code == 302
    later = ModelPrice.objects.get(valid_from__day=2)
    changed = operator.post(f"/admin/billing/modelprice/{later.pk}/change/", given)
    assert (changed.status_code, len(changed.context["errors"])) == (200, 1)
    assert operator.post(f"/admin/billing/modelprice/{later.pk}/change/", given | {"valid_from_0": "2026-01-03"}).url


def test_a_refreshed_and_an_own_price_may_begin_together(operator: Client) -> None:
    at = timezone.now().replace(year=2026, month=1, day=1, hour=0, minute=0, second=0, microsecond=0)
    ModelPrice.objects.create(model="mine", valid_from=at, source=PriceSource.REFRESHED)
    given = {"model": "mine", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00", "input": "10"}
    assert operator.post("/admin/billing/modelprice/add/", given).status_code == 302


def test_a_price_for_a_pattern_that_matches_nothing_is_refused(operator: Client) -> None:
    given = {"model": "gpt-*-mini", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00", "input": "10"}
    answer = operator.post("/admin/billing/modelprice/add/", given)
    assert (answer.status_code, len(answer.context["errors"])) == (200, 1)
    assert operator.post("/admin/billing/modelprice/add/", given | {"model": "gpt-*"}).status_code == 302


@pytest.mark.parametrize("place", ["change", "block_this", "unblock_this"])
def test_a_key_that_is_none_is_not_found(operator: Client, place: str) -> None:
    for number in ("abc", "99", "9" * 30):
        assert operator.get(f"/admin/billing/apikey/{number}/{place}/").status_code in (302, 404)


def test_a_refreshed_price_is_not_for_changing(operator: Client) -> None:
    price = ModelPrice.objects.create(model="m", valid_from=timezone.now(), source=PriceSource.REFRESHED)
    assert operator.post(f"/admin/billing/modelprice/{price.pk}/change/", {"model": "x"}).status_code == 403


@pytest.mark.parametrize("model", MODELS)
def test_nobody_sees_the_ledger_without_logging_in(client: Client, model: str) -> None:
    assert client.get(f"/admin/billing/{model}/").status_code == 302


# Limits


def test_a_key_that_is_entered_is_registered_and_one_that_was_only_used_is_not(operator: Client, key: ApiKey) -> None:
    assert not key.registered
    operator.post(
        "/admin/billing/apikey/add/",
        {"api_key": "sk-entered-0123456789", "label": "entered", "price_factor": "1", "requests_per_minute": "5"},
    )
    entered = ApiKey.objects.get(label="entered")
    assert (entered.registered, entered.requests_per_minute, entered.monthly_usd) == (True, 5, None)
    assert entered.policy_changed_at is not None


def test_keys_are_registered_from_their_list_and_it_is_logged(operator: Client, key: ApiKey) -> None:
    for action, is_registered in (("register", True), ("unregister", False)):
        given = {"action": action, "_selected_action": [key.pk], "index": "0"}
        assert operator.post("/admin/billing/apikey/", given).status_code == 200  # asks first
        key.refresh_from_db()
        assert key.registered is not is_registered
        operator.post("/admin/billing/apikey/", given | {"confirmed": "yes"})
        key.refresh_from_db()
        assert key.registered is is_registered
    assert LogEntry.objects.count() == 2


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"allowed_networks": "10.0.0.0/8\n192.0.2.1/24"}, "allowed_networks"),
        ({"allowed_networks": "here"}, "allowed_networks"),
        ({"allowed_models": "gpt-*-mini"}, "allowed_models"),
        ({"requests_per_minute": "-1"}, "requests_per_minute"),
        ({"monthly_usd": "much"}, "monthly_usd"),
    ],
)
def test_limits_that_mean_nothing_are_refused(operator: Client, key: ApiKey, given: dict[str, str], field: str) -> None:
    page = operator.post(f"/admin/billing/apikey/{key.pk}/change/", form_of(**given))
    assert field in page.context["adminform"].form.errors


def test_limits_are_counted_together_or_not_at_all(operator: Client, key: ApiKey, settings: Any) -> None:
    settings.WORKERS, settings.REDIS_URL = 2, ""
    address = f"/admin/billing/apikey/{key.pk}/change/"
    page = operator.post(address, form_of(concurrent_streams="3"))
    assert "concurrent_streams" in page.context["adminform"].form.errors
    assert operator.post(address, form_of(allowed_models="gpt-4o\no3*")).status_code == 302
    key.refresh_from_db()
    assert key.allowed_models.split() == ["gpt-4o", "o3*"]


def form_of(**given: str) -> dict[str, str]:
    management = {f"grants-{name}": "0" for name in ("TOTAL_FORMS", "INITIAL_FORMS", "MIN_NUM_FORMS", "MAX_NUM_FORMS")}
    return {"label": "", "owner": "", "price_factor": "1", **management, **given}
