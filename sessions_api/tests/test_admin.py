"""What operators see of conversations, and what it takes to read along."""

from __future__ import annotations

import datetime as dt

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from sessions_api.models import ChatHolding, ChatMessage, ChatSession
from sessions_api.tests.conversations import API_KEY, begin, caller, take_turn

pytestmark = pytest.mark.django_db
LIST = "/admin/sessions_api/chatsession/"


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(get_user_model().objects.create_superuser("operator"))
    return client


def staff(client: Client, *permissions: str) -> Client:
    user = get_user_model().objects.create_user("helper", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(user)
    return client


def messages_page(session: ChatSession) -> str:
    return f"{LIST}{session.pk}/messages/"


def test_the_list_shows_what_there_is_and_nothing_of_what_was_said(operator: Client) -> None:
    take_turn("my-session", "a secret", now=timezone.now())
    page = operator.get(LIST, headers={"Accept-Language": "en"}).content.decode().replace("\xa0", " ")
    for shown in ("my-session", "sk-…cdef", "29 minutes"):
        assert shown in page
    assert "a secret" not in page
    assert API_KEY not in page


def test_expired_sessions_and_unfinished_ones_are_not_there(operator: Client) -> None:
    take_turn("expired", "x", now=timezone.now() - dt.timedelta(hours=1))
    begin("unfinished", now=timezone.now())
    assert list(operator.get(LIST).context["cl"].result_list) == []


def test_the_list_takes_as_many_queries_with_more_rows(operator: Client) -> None:
    counts = []
    for name in ("a", "b"):
        for number in range(5):
            take_turn(f"{name}{number}", "x", now=timezone.now())
        with CaptureQueriesContext(connection) as queries:
            assert operator.get(LIST).status_code == 200
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 8


@pytest.mark.parametrize(("query", "found"), [("my-", 1), ("sk-…cdef", 2), ("nobody", 0)])
def test_sessions_are_found_by_id_and_by_key_hint(operator: Client, query: str, found: int) -> None:
    take_turn("my-session", "x", now=timezone.now())
    take_turn("other", "x", now=timezone.now())
    assert len(operator.get(LIST, {"q": query}).context["cl"].result_list) == found


def test_opening_the_messages_shows_them_and_is_logged(operator: Client) -> None:
    session = take_turn("s", "<b>a\nsecret</b>", now=timezone.now()).session
    assert not LogEntry.objects.exists()
    change_page = operator.get(f"{LIST}{session.pk}/change/").content.decode()
    assert "secret" not in change_page
    assert messages_page(session) in change_page
    assert not LogEntry.objects.exists()
    page = operator.get(messages_page(session)).content.decode()
    assert "&lt;b&gt;a<br>secret&lt;/b&gt;" in page
    entry = LogEntry.objects.get()
    assert (entry.object_id, entry.change_message) == (str(session.pk), "messages opened")
    assert entry.user.get_username() == "operator"


def test_who_reads_chinese_sees_no_english_around_what_was_said(operator: Client) -> None:
    session = take_turn("s", "x", now=timezone.now()).session
    operator.defaults["HTTP_ACCEPT_LANGUAGE"] = "zh-CN"
    page = operator.get(messages_page(session)).content.decode()
    assert [role in page for role in (">用户<", ">助手<", ">user<", ">assistant<")] == [True, True, False, False]
    for log in ("/admin/admin/logentry/", f"{LIST}{session.pk}/history/"):
        page = operator.get(log).content.decode()
        assert "查看了消息内容" in page, log
        assert "messages opened" not in page, log


def test_reading_takes_a_permission_of_its_own(client: Client) -> None:
    session = take_turn("s", "a secret", now=timezone.now()).session
    helper = staff(client, "view_chatsession", "view_chatmessage")
    assert helper.get(LIST).status_code == 200
    assert messages_page(session) not in helper.get(f"{LIST}{session.pk}/change/").content.decode()
    assert helper.get(messages_page(session)).status_code == 403
    assert not LogEntry.objects.exists()


def test_a_sealed_session_shows_that_it_is_sealed(operator: Client, settings: Settings) -> None:
    settings.SESSION_SEALED = True
    session = take_turn("s", "a secret", now=timezone.now()).session
    page = operator.get(messages_page(session), headers={"Accept-Language": "en"}).content.decode()
    assert "Sealed: only" in page
    assert not LogEntry.objects.exists()


def test_a_session_whose_secret_is_gone_says_so(operator: Client, settings: Settings) -> None:
    session = take_turn("s", "a secret", now=timezone.now()).session
    settings.SESSION_KEYS = ["another" * 10]
    page = operator.get(messages_page(session), headers={"Accept-Language": "en"}).content.decode()
    assert "cannot be decrypted" in page


def test_nothing_is_added_or_changed(operator: Client) -> None:
    session = take_turn("s", "x", now=timezone.now()).session
    assert operator.get(f"{LIST}add/").status_code == 403
    assert operator.post(f"{LIST}{session.pk}/change/", {"model": "x"}).status_code == 403
    assert operator.post(f"{LIST}{session.pk}/delete/", {"post": "yes"}).status_code == 403


def test_deleting_now_takes_everything_with_it_and_is_logged(operator: Client) -> None:
    gone, stays = (take_turn(name, "x", now=timezone.now()).session for name in ("gone", "stays"))
    delete = {"action": "delete_now", "_selected_action": [gone.pk]}
    assert operator.post(LIST, delete).status_code == 200
    assert ChatSession.objects.count() == 2  # it asks first
    assert operator.post(LIST, delete | {"confirmed": "yes"}).status_code == 302
    assert [session.session_id for session in ChatSession.objects.all()] == ["stays"]
    assert set(ChatMessage.objects.values_list("session", flat=True)) == {stays.pk}
    assert ChatHolding.objects.get(pk=caller().fingerprint).sessions == 1
    assert LogEntry.objects.get(change_message="deleted now").object_repr == "gone (sk-…cdef)"


def test_deleting_takes_the_permission_for_it(client: Client) -> None:
    session = take_turn("s", "x", now=timezone.now()).session
    helper = staff(client, "view_chatsession")
    helper.post(LIST, {"action": "delete_now", "_selected_action": [session.pk], "confirmed": "yes"})
    assert ChatSession.objects.exists()


@pytest.mark.parametrize("path", ["", "1/change/", "1/messages/"])
def test_nobody_sees_conversations_without_logging_in(client: Client, path: str) -> None:
    assert client.get(LIST + path).status_code == 302
