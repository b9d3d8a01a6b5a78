"""What operators see and may do: roles, the log of changes, the first page, header fields."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as project
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group, User
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.translation import override

from billing.admin.audit import values_in
from billing.models import ApiKey, Grant, ModelPrice, Purge
from billing.seeding import seed_usage
from billing.services import give_grant, record_events
from billing.tests.samples import API_KEY, event
from gateway.models import WorkerState
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from proxysite import health, upstream_probe
from proxysite.models import TaskRun
from proxysite.roles import make_roles

pytestmark = pytest.mark.django_db


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(get_user_model().objects.create_superuser("operator"))
    return client


@pytest.fixture
def key() -> ApiKey:
    record_events([event(at=timezone.now())])
    return ApiKey.objects.get()


# Roles


def member(role: str) -> Client:
    make_roles()
    user = User.objects.create_user(role, is_staff=True)
    user.groups.add(Group.objects.get(name=role))
    client = Client()
    client.force_login(user)
    return client


def test_roles_are_made_once_and_put_right_again(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("roles")
    before = {group.name: set(group.permissions.all()) for group in Group.objects.all()}
    assert set(before) == {"operator", "accountant", "support"}
    assert "made or put right" in capsys.readouterr().out
    call_command("roles")
    assert "made or put right" not in capsys.readouterr().out
    Group.objects.get(name="support").permissions.set(before["operator"])
    call_command("roles")
    assert {group.name: set(group.permissions.all()) for group in Group.objects.all()} == before


@pytest.mark.parametrize(
    ("role", "url", "status"),
    [
        ("operator", "/admin/billing/apikey/add/", 200),
        ("operator", "/admin/billing/usagerecord/export/", 200),
        ("operator", "/admin/axes/accessattempt/", 200),
        ("operator", "/admin/admin/logentry/", 200),
        ("operator", "/admin/auth/user/", 200),
        ("operator", "/admin/auth/user/add/", 403),
        ("operator", "/admin/auth/group/add/", 403),
        ("accountant", "/admin/billing/grant/add/", 200),
        ("accountant", "/admin/billing/modelprice/add/", 200),
        ("accountant", "/admin/billing/apikey/export/", 200),
        ("accountant", "/admin/billing/apikey/add/", 403),
        ("accountant", "/admin/auth/user/", 403),
        ("accountant", "/admin/axes/accesslog/", 403),
        ("accountant", "/admin/admin/logentry/", 403),
        ("support", "/admin/", 200),
        ("support", "/admin/billing/apikey/", 200),
        ("support", "/admin/billing/usagerecord/", 200),
        ("support", "/admin/admin/logentry/", 403),
        ("support", "/admin/billing/grant/add/", 403),
        ("support", "/admin/billing/modelprice/add/", 403),
        ("support", "/admin/billing/usagerecord/export/", 403),
    ],
)
def test_a_role_may_do_what_it_is_for(role: str, url: str, status: int) -> None:
    assert member(role).get(url).status_code == status


@pytest.mark.parametrize(
    ("role", "may_block", "may_grant"), [("operator", 1, 1), ("accountant", 0, 1), ("support", 0, 0)]
)
def test_actions_on_keys_ask_for_their_own_right(role: str, may_block: int, may_grant: int, key: ApiKey) -> None:
    client = member(role)
    for action in ("block", "grant"):
        fields = {"action": action, "_selected_action": [key.pk], "confirmed": "yes", "amount_usd": "5"}
        client.post("/admin/billing/apikey/", fields)
    key.refresh_from_db()
    assert (key.blocked, Grant.objects.count()) == (bool(may_block), may_grant)
    block_page = client.get(f"/admin/billing/apikey/{key.pk}/{'unblock_this' if may_block else 'block_this'}/")
    assert block_page.status_code == (200 if may_block else 403)


def test_support_reads_no_messages_whoever_keeps_them() -> None:
    make_roles()
    names = set(Group.objects.get(name="support").permissions.values_list("codename", flat=True))
    assert not [name for name in names if "message" in name or not name.startswith("view_")]


# The log of changes


def changes() -> list[tuple[str, str, str]]:
    with override("en"):
        return values_in(LogEntry.objects.latest("pk"))


def test_a_change_is_written_down_before_and_after(operator: Client, key: ApiKey) -> None:
    fields = {"label": "Anna", "owner": "", "price_factor": "0.9000"}
    management = {f"grants-{name}": "0" for name in ("TOTAL_FORMS", "INITIAL_FORMS")}
    operator.post(f"/admin/billing/apikey/{key.pk}/change/", fields | management)
    assert ("price factor", "1.0000", "0.9000") in changes()
    assert ("label", "", "Anna") in changes()
    entry = LogEntry.objects.latest("pk")
    assert (entry.user.get_username(), entry.get_edited_object()) == ("operator", key)
    page = operator.get("/admin/admin/logentry/", headers={"Accept-Language": "en"}).content.decode()
    assert "price factor: 1.0000 → <strong>0.9000</strong>" in page


def test_what_is_added_and_removed_is_written_down_too(operator: Client) -> None:
    given = {"model": "mine", "valid_from_0": "2026-01-01", "valid_from_1": "00:00:00", "input": "10"}
    operator.post("/admin/billing/modelprice/add/", given)
    assert ("input", "", "10") in [
        (name, before, str(Decimal(after))) for name, before, after in changes() if name == "input"
    ]
    price = ModelPrice.objects.get()
    operator.post(f"/admin/billing/modelprice/{price.pk}/delete/", {"post": "yes"})
    assert ("model", "mine", "") in changes()
    for entry in LogEntry.objects.all():
        assert entry.get_change_message()


def test_grants_for_several_keys_are_logged_one_by_one(operator: Client) -> None:
    record_events([event(key=f"k{n}", at=timezone.now()) for n in range(3)])
    ids = list(ApiKey.objects.values_list("pk", flat=True))
    fields: dict[str, Any] = {"action": "grant", "_selected_action": ids}
    assert "amount" in operator.post("/admin/billing/apikey/", fields).content.decode()
    wrong = operator.post("/admin/billing/apikey/", fields | {"confirmed": "yes", "amount_usd": "-1"})
    assert wrong.status_code == 200
    assert not Grant.objects.exists()
    operator.post("/admin/billing/apikey/", fields | {"confirmed": "yes", "amount_usd": "5", "reason": "paid"})
    assert sorted(Grant.objects.values_list("key", "amount_usd", "reason")) == [(pk, 5, "paid") for pk in sorted(ids)]
    assert LogEntry.objects.filter(action_flag=1).count() == 3


def test_the_log_holds_no_password_and_no_key(operator: Client) -> None:
    password = "a-long-and-secret-password"
    operator.post(
        "/admin/auth/user/add/",
        {"username": "new", "password1": password, "password2": password, "usable_password": "true"},
    )
    user = get_user_model().objects.get(username="new")
    operator.post(f"/admin/auth/user/{user.pk}/password/", {"password1": password[::-1], "password2": password[::-1]})
    now = {"valid_from_0": "2026-01-01", "valid_from_1": "00:00:00", "valid_until_0": "", "valid_until_1": ""}
    operator.post("/admin/billing/grant/add/", {"api_key": API_KEY, "amount_usd": "1", **now})
    assert Grant.objects.count() == 1
    user.refresh_from_db()
    written = json.dumps(list(LogEntry.objects.values_list("change_message", "object_repr")))
    for secret in (password, password[::-1], user.password, API_KEY):
        assert secret not in written


def test_the_log_itself_is_not_for_changing(operator: Client, key: ApiKey) -> None:
    operator.post("/admin/billing/apikey/", {"action": "block", "_selected_action": [key.pk], "confirmed": "yes"})
    entry = LogEntry.objects.get()
    url = f"/admin/admin/logentry/{entry.pk}"
    assert operator.get(f"{url}/change/").status_code == 200
    assert operator.post(f"{url}/change/", {"object_repr": "x"}).status_code == 403
    assert operator.post(f"{url}/delete/", {"post": "yes"}).status_code == 403


# The first page


def test_the_first_page_takes_as_many_queries_with_more_rows(operator: Client) -> None:
    counts = []
    for size in (1, 8):
        seed_usage(40 * size, keys=5 * size, days=3 * size, until=timezone.now().date(), seed=size)
        for period in ("24h", "7d", "90d"):
            with CaptureQueriesContext(connection) as queries:
                assert operator.get(f"/admin/?period={period}").status_code == 200
            counts.append(len(queries))
            assert not [query for query in queries.captured_queries if "usagerecord" in query["sql"]]
        connection.cursor().execute("DELETE FROM billing_usagerecord")
    assert set(counts) == {14}


def test_the_first_page_shows_todays_figures_and_what_costs_most(operator: Client) -> None:
    record_events([event(at=timezone.now()), event(at=timezone.now(), model="nobody-knows-me")])
    page = operator.get("/admin/", headers={"Accept-Language": "en"}).content.decode()
    assert "nobody-knows-me (1)" in page
    assert "sk-…wxyz" in page
    assert "$0.0005" in page


@pytest.mark.parametrize("period", ["", "1y", "24h", "%00"])
def test_a_period_that_is_none_is_the_last_day(operator: Client, period: str) -> None:
    assert operator.get(f"/admin/?period={period}").context["period"] == "24h"


def test_open_streams_are_those_of_all_workers_that_live(operator: Client) -> None:
    now = timezone.now()
    states = [("a:1", 3, 0), ("b:1", 4, 5), ("c:1", 100, 60)]
    for worker, open_streams, age_s in states:
        WorkerState.objects.create(
            worker=worker,
            seen_at=now - dt.timedelta(seconds=age_s),
            open_streams=open_streams,
            journal_bytes=10,
            journal_age_s=1,
        )
    assert operator.get("/admin/").context["open_streams"] == "7"


def health_of(operator: Client, name: str) -> health.Item:
    items = operator.get("/admin/", headers={"Accept-Language": "en"}).context["health"]
    found: health.Item = next(item for item in items if item.name == name)
    return found


def worker_says(**given: Any) -> None:
    said = {"open_streams": 0, "journal_bytes": 0, "journal_age_s": 0.0, "journal_alarm": ""} | given
    WorkerState.objects.update_or_create(worker="a:1", defaults={"seen_at": timezone.now(), **said})


def test_a_gateway_that_says_nothing_is_bad(operator: Client) -> None:
    assert health_of(operator, "Gateway").state == "bad"
    worker_says()
    assert health_of(operator, "Gateway") == health.Item("Gateway", "good", "1 worker")


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ({}, "good"),
        ({"journal_bytes": 5000, "journal_age_s": 2.0}, "good"),
        ({"journal_bytes": 5000, "journal_age_s": 50.0}, "warn"),
        ({"journal_bytes": 5000, "journal_age_s": 500.0}, "bad"),
        ({"journal_alarm": "the disk is full"}, "bad"),
    ],
)
def test_a_journal_that_waits_or_complains_shows(operator: Client, said: dict[str, Any], state: str) -> None:
    project.JOURNAL_DIR.mkdir(parents=True, exist_ok=True)
    worker_says(**said)
    item = health_of(operator, "Journal")
    assert item.state == state
    assert bool(item.advice) == (state != "good")


@pytest.mark.parametrize(("wish", "state"), [("allow", "warn"), ("refuse", "bad")])
def test_limits_that_cannot_be_counted_show(operator: Client, settings: Any, wish: str, state: str) -> None:
    worker_says()
    assert health_of(operator, "Limits").state == "good"
    settings.ON_LIMITS_UNAVAILABLE = wish
    worker_says(limits_away=True)
    item = health_of(operator, "Limits")
    assert (item.state, item.finding) == (state, "1 worker cannot count")
    worker_says(limits_away=False)
    settings.WORKERS, settings.REDIS_URL, settings.KEY_REQUESTS_PER_MINUTE = 2, "", 5
    assert health_of(operator, "Limits").state == "bad"


def test_a_purge_that_never_ran_or_did_not_finish_shows(operator: Client) -> None:
    assert health_of(operator, "Last purge").state == "off"
    purge = Purge.objects.create(before=timezone.now().date())
    assert health_of(operator, "Last purge").state == "warn"
    purge.finished_at = timezone.now()
    purge.save()
    found = health_of(operator, "Last purge")
    assert found == health.Item("Last purge", "good", "usage records: just now; conversations: never")
    Purge.objects.update(started_at=timezone.now() - dt.timedelta(days=9))
    assert health_of(operator, "Last purge").advice


@pytest.mark.parametrize(("minutes", "state", "seen"), [(0, "good", "just now"), (9, "warn", "9\xa0minutes ago")])
def test_the_purge_of_conversations_shows_and_warns_when_it_is_late(
    operator: Client, minutes: int, state: str, seen: str
) -> None:
    at = timezone.now() - dt.timedelta(minutes=minutes)
    TaskRun.objects.create(
        task="sessions_api.tasks.purge_sessions", outcome="succeeded", last_started_at=at, last_succeeded_at=at
    )
    item = health_of(operator, "Last purge")
    assert (item.state, item.finding) == (state, f"usage records: never; conversations: {seen}")
    assert ("manage.py purge_sessions" in item.advice) == (state == "warn")


def test_who_may_not_see_usage_sees_none_of_it(client: Client, key: ApiKey) -> None:
    give_grant(key, Decimal(1))
    client.force_login(User.objects.create_user("guest", is_staff=True))
    page = client.get("/admin/")
    assert page.status_code == 200
    assert key.hint not in page.content.decode()


# The upstream and the header fields, live


def test_the_upstream_is_asked_and_the_answer_is_kept_for_a_while(own_proxy: LiveProxy, upstream: Any) -> None:
    from proxysite.tests.test_logins import Browser, new_user

    browser = Browser(own_proxy)
    assert browser.log_in(new_user(own_proxy, "probe")) == 302
    lines = [browser.client.get("/admin/health/upstream/").text for _ in range(2)]
    assert 'data-state="good"' in lines[0]
    assert lines[0] == lines[1]
    assert [request.target for request in upstream.requests] == ["/v1/models"]
    assert not [name for name, _ in upstream.requests[0].headers if name.lower() == "authorization"]


def test_an_upstream_that_is_away_is_bad(settings: Any) -> None:
    settings.UPSTREAM_URL = "http://127.0.0.1:9"
    found = upstream_probe.probe()
    assert (found.is_reachable, found.trouble) == (False, "ConnectError")
    assert health.upstream().state == "bad"
    assert upstream_probe.probe() == found


def test_an_upstream_whose_answer_never_ends_keeps_no_page_waiting(settings: Any) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.chunk(b" ")
        await exchange.wait_until_client_leaves()

    with FakeUpstream(script) as upstream:
        settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}
        settings.UPSTREAM_URL = upstream.url
        assert upstream_probe.probe().trouble == ""


def test_the_upstream_is_asked_without_the_cache_too(operator: Client, settings: Any) -> None:
    settings.CACHES = {"default": {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": "redis://127.0.0.1:1"}}
    settings.UPSTREAM_URL = "http://127.0.0.1:9"
    page = operator.get("/admin/health/upstream/")
    assert page.status_code == 200
    assert "ConnectError" in page.content.decode()


def test_workers_report_and_take_it_back_when_they_end(tmp_path: Path) -> None:
    with LiveProxy(var_dir=tmp_path) as proxy:
        ((worker, open_streams),) = proxy.wait_for_rows("SELECT worker, open_streams FROM gateway_workerstate", 1)
        assert open_streams == 0
        assert str(proxy.worker_pids[0]) in worker
        proxy.stop()
        assert proxy.rows("SELECT * FROM gateway_workerstate") == []


def test_pages_carry_every_security_field(own_proxy: LiveProxy) -> None:
    public, admin = own_proxy.get("/").headers, own_proxy.get("/admin/login/").headers
    for headers in (public, admin):
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert "camera=()" in headers["Permissions-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "Strict-Transport-Security" not in headers
    assert "unsafe" not in public["Content-Security-Policy"]
    assert "script-src 'self' 'unsafe-eval'" in admin["Content-Security-Policy"]
    assert "script-src 'self' 'unsafe-inline'" not in admin["Content-Security-Policy"]
    assert "no-store" in admin["Cache-Control"]


def test_https_is_demanded_where_the_public_address_has_it(tmp_path: Path) -> None:
    with LiveProxy(var_dir=tmp_path, PUBLIC_URL="https://api.example.com") as proxy:
        through_tls = {"Host": "api.example.com", "X-Forwarded-Proto": "https"}
        answer = proxy.get("/admin/login/", headers=through_tls)
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert "Secure" in answer.headers["Set-Cookie"]
        assert (
            "Strict-Transport-Security" not in proxy.get("/admin/login/", headers={"Host": "api.example.com"}).headers
        )
