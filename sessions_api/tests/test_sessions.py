"""`/pro/sessions` on a running proxy: what developers see of their sessions, and what they see of nobody else's."""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from sessions_api.tests.conversations import (
    API_KEY,
    EMPTY,
    execute,
    expire_all,
    held_turn,
    say,
    sibling,
    stored,
    take_turn,
)
from sessions_api.tests.session_calls import BEARER, ENGLISH, NOT_FOUND, STRANGER, address, failed, names, told


def moment(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)


# List


def test_sessions_are_listed_newest_first_without_what_was_said(chat_proxy: LiveProxy) -> None:
    for session in ("a", "b", "c", "a"):
        say(chat_proxy, "secret words", session=session, model="gpt-4o")
    answer = chat_proxy.get("/pro/sessions", headers=BEARER)
    data = told(answer)
    assert [session["sessionId"] for session in data["sessions"]] == ["a", "c", "b"]
    assert data["next"] is None
    first = data["sessions"][0]
    assert (first["model"], first["messageCount"], first["isSealed"]) == ("gpt-4o", 4, False)
    assert first["tokens"] > 0
    assert moment(first["expiresAt"]) - moment(first["lastMessageAt"]) == dt.timedelta(minutes=30)
    assert moment(first["createdAt"]) < moment(data["sessions"][2]["createdAt"]) < moment(first["lastMessageAt"])
    assert "secret" not in answer.text


def test_a_list_that_changes_is_read_page_by_page(chat_proxy: LiveProxy) -> None:
    for session in ("a", "b", "c", "d", "e"):
        say(chat_proxy, "hi", session=session)
    seen, query = [], {"limit": "2"}
    while True:
        page = told(chat_proxy.get("/pro/sessions", headers=BEARER, params=query))
        seen.append([session["sessionId"] for session in page["sessions"]])
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
        if len(seen) == 1:
            say(chat_proxy, "again", session="e")
            chat_proxy.request("DELETE", address("d"), headers=BEARER)
    assert seen == [["e", "d"], ["c", "b"], ["a"]]
    assert names(chat_proxy) == ["e", "c", "b", "a"]


def test_sessions_of_one_moment_are_told_apart_by_name(chat_proxy: LiveProxy) -> None:
    for session in ("a", "b", "c"):
        say(chat_proxy, "hi", session=session)
    execute(chat_proxy, "UPDATE sessions_api_chatsession SET last_message_at = '2026-01-01 00:00:00'")
    first = told(chat_proxy.get("/pro/sessions?limit=2", headers=BEARER))
    rest = told(chat_proxy.get(f"/pro/sessions?limit=2&cursor={first['next']}", headers=BEARER))
    assert [session["sessionId"] for session in first["sessions"] + rest["sessions"]] == ["c", "b", "a"]


@pytest.mark.parametrize("limit", ["", "0", "-1", "101", "1.5", "ten", "1_0", "１０", "9" * 5000, " 1"])
def test_a_limit_is_a_small_number(chat_proxy: LiveProxy, limit: str) -> None:
    answer = chat_proxy.get("/pro/sessions", headers=BEARER | ENGLISH, params={"limit": limit})
    assert failed(answer) == (400, "limit must be a whole number from 1 to 100.")


def cursor(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize(
    "hostile",
    [
        *("", "%", "密", "a", "AAAA", "=" * 9, "//8", cursor([1]), cursor(["1", "a"]), cursor([1.5, "a"])),
        *(cursor([10**30, "a"]), cursor([-(10**18), "a"]), cursor([1, "a\0"]), cursor([1, ""]), cursor([1, "\ud800"])),
    ],
)
def test_a_cursor_is_what_a_page_said(chat_proxy: LiveProxy, hostile: str) -> None:
    answer = chat_proxy.get("/pro/sessions", headers=BEARER | ENGLISH, params={"cursor": hostile})
    assert failed(answer) == (400, "cursor is not valid: send the previous page's next.")


def test_a_cursor_of_another_key_shows_nothing_of_it(chat_proxy: LiveProxy) -> None:
    for session in ("a", "b"):
        say(chat_proxy, "hi", session=session)
    page = told(chat_proxy.get("/pro/sessions?limit=1", headers=BEARER))
    assert told(chat_proxy.get(f"/pro/sessions?cursor={page['next']}", headers=STRANGER))["sessions"] == []


# Read


def test_a_session_is_read_whole(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "one")
    say(chat_proxy, "two")
    data = told(chat_proxy.get(address("s"), headers=BEARER))
    (listed,) = told(chat_proxy.get("/pro/sessions", headers=BEARER))["sessions"]
    messages = data.pop("messages")
    assert data == listed
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "one"),
        ("assistant", "1: one!"),
        ("user", "two"),
        ("assistant", "3: two!"),
    ]
    assert sum(message["tokens"] for message in messages) == data["tokens"]
    assert messages[3]["createdAt"] == data["lastMessageAt"]
    assert chat_proxy.request("HEAD", address("s"), headers=BEARER).status_code == 200


def test_what_is_answered_depends_on_no_accept_header(chat_proxy: LiveProxy) -> None:
    for accepted in ("text/html", "application/xml", "garbage", ""):
        assert told(chat_proxy.get("/pro/sessions?format=xml", headers=BEARER | {"Accept": accepted}))["next"] is None


def test_an_expired_session_does_not_exist(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "one")
    expire_all(chat_proxy)
    assert names(chat_proxy) == []
    for method, action in (("GET", ""), ("GET", "/export"), ("DELETE", "")):
        assert chat_proxy.request(method, address("s", action), headers=BEARER).json() == NOT_FOUND


def test_a_sealed_session_opens_with_its_key(chat_proxy: LiveProxy) -> None:
    with sibling(chat_proxy, SESSION_SEALED="true") as proxy:
        say(proxy, "one")
        data = told(proxy.get(address("s"), headers=BEARER))
    assert (data["isSealed"], data["messages"][0]["content"]) == (True, "one")


def test_a_session_that_cannot_be_decrypted_says_so(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "one")
    execute(chat_proxy, "UPDATE sessions_api_chatmessage SET position = position + 7")
    for action in ("", "/export"):
        answer = chat_proxy.get(address("s", action), headers=BEARER | ENGLISH)
        assert failed(answer) == (500, "What was said in this session cannot be decrypted; use another sessionId.")
    assert names(chat_proxy) == ["s"]
    assert told(chat_proxy.request("DELETE", address("s"), headers=BEARER)) == {"deleted": 1}


# Another key's


@pytest.mark.parametrize(("method", "action"), [("GET", ""), ("GET", "/export"), ("DELETE", "")])
def test_another_keys_session_is_as_one_that_never_was(chat_proxy: LiveProxy, method: str, action: str) -> None:
    say(chat_proxy, "one", session="here")
    say(chat_proxy, "hi", session="own", api_key=STRANGER["Authorization"][7:])

    def answer(session: str) -> tuple[object, ...]:
        got = chat_proxy.request(method, address(session, action), headers=STRANGER)
        return got.status_code, [pair for pair in got.headers.raw if pair[0] != b"date"], got.content

    assert answer("here") == answer("none")
    assert answer("here")[0] == 404
    assert names(chat_proxy, STRANGER) == ["own"]
    assert told(chat_proxy.get(address("here"), headers=BEARER))["messageCount"] == 2


@pytest.mark.django_db
@pytest.mark.parametrize(("method", "action"), [("get", ""), ("get", "/export"), ("delete", "")])
def test_another_keys_session_costs_what_no_session_costs(client: Client, method: str, action: str) -> None:
    take_turn("here", "one", now=timezone.now())

    def queries(session: str) -> list[str]:
        with CaptureQueriesContext(connection) as captured:
            assert getattr(client, method)(address(session, action), headers=STRANGER).status_code == 404
        return [re.sub(r"'[^']*'|_x\d+", "?", query["sql"]) for query in captured]

    assert queries("here") == queries("none")


# Delete


def test_a_deleted_session_starts_afresh(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    say(chat_proxy, "one")
    say(chat_proxy, "kept", session="t")
    assert told(chat_proxy.request("DELETE", address("s"), headers=BEARER)) == {"deleted": 1}
    assert chat_proxy.request("DELETE", address("s"), headers=BEARER).json() == NOT_FOUND
    assert names(chat_proxy) == ["t"]
    assert say(chat_proxy, "two").json()["data"] == "1: two!"


def test_all_sessions_of_a_key_are_deleted_and_no_others(chat_proxy: LiveProxy) -> None:
    for session in ("a", "b"):
        say(chat_proxy, "hi", session=session)
    expire_all(chat_proxy)
    for session in ("b", "c"):
        say(chat_proxy, "hi", session=session)
    say(chat_proxy, "hi", api_key=STRANGER["Authorization"][7:])
    assert told(chat_proxy.request("DELETE", "/pro/sessions", headers=BEARER)) == {"deleted": 2}
    assert told(chat_proxy.request("DELETE", "/pro/sessions", headers=BEARER)) == {"deleted": 0}
    assert [row[0] for row in stored(chat_proxy)] == ["s", "s"]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("target", ["/pro/sessions/s", "/pro/sessions"])
def test_a_session_deleted_during_a_turn_stays_deleted(
    chat_proxy: LiveProxy, upstream: FakeUpstream, target: str, is_first: bool
) -> None:
    if not is_first:
        say(chat_proxy, "zero")
    with ExitStack() as stack:
        gate, turn = held_turn(upstream, stack, chat_proxy)
        count = int(target.endswith("/s") or not is_first)
        assert told(chat_proxy.request("DELETE", target, headers=BEARER)) == {"deleted": count}
        gate.open()
        answer = turn.result()
    assert answer.status_code == 409
    assert "本轮对话未保存" in answer.json()["message"]
    assert stored(chat_proxy) == EMPTY
    assert chat_proxy.rows("SELECT sum(sessions), sum(messages) FROM sessions_api_chatholding") in (
        [(0, 0)],
        [(None, None)],
    )
    assert say(chat_proxy, "next").json()["data"] == "1: next!"


# Who may ask, how, and how often


def test_a_key_is_taken_from_the_header_only(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "hello")
    for headers, code, message in (
        ({}, 400, "The API key is missing: send it as Authorization: Bearer."),
        ({"Authorization": API_KEY}, 400, "The API key is missing: send it as Authorization: Bearer."),
        ({"Authorization": f"Basic {API_KEY}"}, 400, "The API key is missing: send it as Authorization: Bearer."),
        ({"Authorization": "Bearer"}, 400, "The API key is missing: send it as Authorization: Bearer."),
        ({"Authorization": "Bearer a b"}, 400, "apiKey holds characters that are not allowed."),
        ({"Authorization": "Bearer \u00e9"}, 400, "apiKey holds characters that are not allowed."),
        ({"Authorization": "Bearer " + "a" * 257}, 400, "apiKey must have 1 to 256 characters."),
    ):
        encoded = {name: value.encode("latin-1") for name, value in (ENGLISH | headers).items()}
        for method, target in (("GET", "/pro/sessions"), ("DELETE", "/pro/sessions"), ("GET", "/pro/sessions/s")):
            answer = chat_proxy.request(method, f"{target}?apiKey={API_KEY}", headers=encoded)
            assert failed(answer) == (code, message)
    assert names(chat_proxy, {"authorization": f"bearer   {API_KEY}"}) == ["s"]


def test_a_blocked_key_sees_nothing(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "hello")
    chat_proxy.wait_for_rows("SELECT 1 FROM billing_apikey WHERE hint = 'sk-…cdef'", 1)
    execute(chat_proxy, "UPDATE billing_apikey SET blocked = true WHERE hint = 'sk-…cdef'")
    try:
        answers = [
            chat_proxy.request(method, target, headers=BEARER | ENGLISH)
            for method, target in (("GET", "/pro/sessions"), ("GET", "/pro/sessions/s"), ("DELETE", "/pro/sessions"))
        ]
    finally:
        execute(chat_proxy, "UPDATE billing_apikey SET blocked = false")
    assert {failed(answer)[0] for answer in answers} == {403}
    assert names(chat_proxy) == ["s"]


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("POST", "/pro/sessions", "GET, DELETE, HEAD, OPTIONS"),
        ("PUT", "/pro/sessions/s", "GET, DELETE, HEAD, OPTIONS"),
        ("GET", "/pro/sessions/s/import", "POST, OPTIONS"),
        ("DELETE", "/pro/sessions/s/export", "GET, HEAD, OPTIONS"),
        ("BREW", "/pro/sessions", "GET, DELETE, HEAD, OPTIONS"),
    ],
)
def test_other_methods_are_refused(chat_proxy: LiveProxy, method: str, target: str, allowed: str) -> None:
    answer = chat_proxy.request(method, target, headers=ENGLISH)
    assert failed(answer) == (405, f"Only {allowed} are answered here.")
    assert answer.headers["allow"] == allowed


def test_a_browser_may_ask_from_anywhere(chat_proxy: LiveProxy) -> None:
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "authorization,x-app",
    }
    allowed = chat_proxy.request("OPTIONS", "/pro/sessions/s", headers=asked)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == "*"
    assert allowed.headers["access-control-allow-methods"] == "DELETE"
    assert allowed.headers["access-control-allow-headers"] == "authorization,x-app"


@pytest.fixture(scope="module")
def limited_proxy(_chat_proxy: LiveProxy) -> Iterator[LiveProxy]:
    # A name of its own: in a Redis that stays, the counts of the last run may still be there.
    prefix = f"{_chat_proxy.var_dir.name}-limited"
    with sibling(_chat_proxy, BALANCE_RATE_PER_MINUTE="3", REDIS_KEY_PREFIX=prefix) as proxy:
        yield proxy


def test_an_address_that_asks_too_often_with_keys_nobody_has_used_must_wait(limited_proxy: LiveProxy) -> None:
    targets = ["/pro/sessions", "/pro/balance", "/pro/sessions/s", "/pro/sessions/s/export"] * 2
    guesses = [{"Authorization": f"Bearer sk-guess-{number}"} for number in range(len(targets))]
    answers = [
        limited_proxy.get(target, headers=guess | ENGLISH) for target, guess in zip(targets, guesses, strict=True)
    ]
    assert 429 not in [answer.status_code for answer in answers[:3]]
    # At the turn of a minute the count begins anew, once.
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 2
    for answer in refused:
        assert failed(answer) == (429, "Too many requests from this address; try again later.")
        assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_whose_key_is_in_use_may_ask_as_often_as_he_likes(chat_proxy: LiveProxy, limited_proxy: LiveProxy) -> None:
    say(chat_proxy, "hi")
    chat_proxy.wait_for_rows("SELECT 1 FROM billing_apikey WHERE hint = 'sk-…cdef'", 1)
    assert {limited_proxy.get("/pro/sessions", headers=BEARER).status_code for _ in range(8)} == {200}


# When things go wrong


def test_a_database_that_fails_is_a_503(chat_proxy: LiveProxy) -> None:
    execute(chat_proxy, "ALTER TABLE sessions_api_chatsession RENAME TO elsewhere")
    try:
        answer = chat_proxy.get("/pro/sessions", headers=BEARER | ENGLISH)
    finally:
        execute(chat_proxy, "ALTER TABLE elsewhere RENAME TO sessions_api_chatsession")
    assert failed(answer) == (503, "Conversations cannot be stored at the moment; try again soon.")
    assert answer.headers["retry-after"] == "1"
    assert names(chat_proxy) == []


def test_no_key_and_no_word_is_logged(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "very secret words")
    for action in ("", "/export", "/other"):
        chat_proxy.get(address("s", action), headers=BEARER)
    assert API_KEY not in chat_proxy.log
    assert "secret" not in chat_proxy.log


@pytest.mark.django_db(transaction=True)
def test_no_connection_to_the_database_is_held_while_an_answer_is_read(client: Client) -> None:
    assert client.get("/pro/sessions", headers={"Authorization": "Bearer sk-test-0123456789"}).status_code == 200
    assert connection.connection is None
