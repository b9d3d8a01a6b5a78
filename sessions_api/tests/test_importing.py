"""Conversations from elsewhere, into a session and out again: `/pro/sessions/{sessionId}/import` and `/export`."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import pytest
from pytest_django import Settings

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from proxysite.envelope import ProError
from sessions_api import selectors, services
from sessions_api.context import Said, messages_for
from sessions_api.models import ChatMessage, ChatSession
from sessions_api.tests.conversations import (
    API_KEY,
    EMPTY,
    NOW,
    begin,
    caller,
    contents_of,
    held_turn,
    say,
    sent_up,
    sibling,
    store,
    stored,
    take_turn,
)
from sessions_api.tests.session_calls import BEARER, ENGLISH, address, failed, told
from sessions_api.tests.test_turns import assert_sums_are_right
from sessions_api.turns import SessionBusyError, TurnLostError

SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2\u2028 🙂\0"},
]
PAIRS = [(message["role"], message["content"]) for message in SAID]


@pytest.fixture
def used_proxy(chat_proxy: LiveProxy) -> LiveProxy:
    """A proxy that has seen API_KEY taken by the upstream, and remembers nothing."""
    say(chat_proxy, "hi")
    chat_proxy.wait_for_rows("SELECT 1 FROM billing_apikey WHERE hint = 'sk-…cdef'", 1)
    chat_proxy.request("DELETE", "/pro/sessions", headers=BEARER)
    return chat_proxy


def bring(proxy: LiveProxy, messages: Any, *, session: str = "s", **options: Any) -> httpx.Response:
    headers = BEARER | options.pop("headers", {})
    return proxy.post(address(session, "/import"), json={"messages": messages, **options}, headers=headers)


# In, on, and out


def test_what_is_imported_is_talked_on_and_exported(used_proxy: LiveProxy, talking: FakeUpstream) -> None:
    data = told(bring(used_proxy, SAID))
    assert (data["sessionId"], data["messageCount"], data["model"]) == ("s", 3, "gpt-3.5-turbo")
    assert data == told(used_proxy.get("/pro/sessions", headers=BEARER))["sessions"][0]
    assert say(used_proxy, "And 2 + 2?", model="gpt-4o").json()["data"] == "4: And 2 + 2?!"
    assert sent_up(talking) == [*PAIRS, ("user", "And 2 + 2?")]
    exported = told(used_proxy.get(address("s", "/export"), headers=BEARER))
    turn = [{"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "4: And 2 + 2?!"}]
    assert exported == {"model": "gpt-4o", "messages": SAID + turn}


def test_what_is_exported_goes_to_v1_and_comes_back(used_proxy: LiveProxy, talking: FakeUpstream) -> None:
    say(used_proxy, "hello", model="gpt-4o")
    exported = told(used_proxy.get(address("s", "/export"), headers=BEARER))
    assert used_proxy.post("/v1/chat/completions", json=exported, headers=BEARER).status_code == 200
    assert json.loads(talking.requests[-1].body) == exported
    again = used_proxy.post(address("t", "/import"), json=exported | {"temperature": 1}, headers=BEARER)
    assert told(again)["model"] == "gpt-4o"
    assert told(used_proxy.get(address("t", "/export"), headers=BEARER)) == exported


def test_an_import_takes_the_place_of_what_was_there(used_proxy: LiveProxy) -> None:
    say(used_proxy, "one")
    say(used_proxy, "two")
    told(bring(used_proxy, SAID))
    assert told(used_proxy.get(address("s", "/export"), headers=BEARER))["messages"] == SAID
    assert used_proxy.rows("SELECT sessions, messages FROM sessions_api_chatholding") == [(1, 3)] * 2


def test_a_sealed_session_can_be_imported(used_proxy: LiveProxy) -> None:
    with sibling(used_proxy, SESSION_SEALED="true") as proxy:
        assert told(bring(proxy, SAID))["isSealed"] is True
        assert told(proxy.get(address("s", "/export"), headers=BEARER))["messages"] == SAID


def test_an_imported_system_message_stays_however_long_the_conversation(
    used_proxy: LiveProxy, talking: FakeUpstream
) -> None:
    with sibling(used_proxy, SESSION_CONTEXT_MESSAGES="2", SESSION_SYSTEM_PROMPT="The operator's.") as proxy:
        told(bring(proxy, SAID))
        for content in ("a", "b", "c"):
            assert say(proxy, content).status_code == 200
    prompts = [("system", "The operator's."), ("system", "Be brief.")]
    assert sent_up(talking) == [*prompts, ("user", "b"), ("assistant", "5: b!"), ("user", "c")]


def test_a_system_message_at_the_beginning_always_goes_up() -> None:
    history = [Said("system", "S", 50), Said("user", "q", 10), Said("assistant", "a", 10)]

    def sent(history: list[Said], most_tokens: int, most_messages: int = 9) -> str:
        messages = messages_for(history, "now", system_prompt="", most_tokens=most_tokens, most_messages=most_messages)
        return " ".join(message["content"] for message in messages)

    assert sent(history, 1000) == "S q a now"
    assert sent(history, 1000, most_messages=2) == "S q a now"
    assert sent(history, 1000, most_messages=1) == "S now"
    assert sent(history, 60) == "S now"
    # Elsewhere it belongs to the turn in which it stands.
    assert sent([*history[1:], *history[:1]], 1000, most_messages=2) == "now"


# What is refused


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages is missing."),
        ("hello", "messages must be an array."),
        ({"role": "user"}, "messages must be an array."),
        ([], "messages must have 1 to 1000 items."),
        ([SAID[1]] * 1001, "messages must have 1 to 1000 items."),
        (["hello"], "messages[0] must be an object."),
        ([SAID[0], None], "messages[1] must be an object."),
        ([SAID[0], {"content": "x"}], "messages[1].role is missing."),
        ([{"role": "tool", "content": "x"}], "messages[0].role must be one of system, user, assistant."),
        ([{"role": ["user"], "content": "x"}], "messages[0].role must be one of system, user, assistant."),
        ([{"role": None, "content": "x"}], "messages[0].role must be one of system, user, assistant."),
        ([{"role": "", "content": "x"}], "messages[0].role must be one of system, user, assistant."),
        ([{"role": "user"}], "messages[0].content is missing."),
        ([{"role": "assistant", "content": None}], "messages[0].content must be a string."),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "messages[0].content must be a string."),
        ([{"role": "user", "content": 1}], "messages[0].content must be a string."),
        ([{"role": "user", "content": ""}], "messages[0].content must have 1 to 1000 characters."),
        ([{"role": "system", "content": "🙂" * 1001}], "messages[0].content must have 1 to 1000 characters."),
    ],
)
def test_a_wrong_field_is_named(used_proxy: LiveProxy, messages: Any, message: str) -> None:
    assert failed(bring(used_proxy, messages, headers=ENGLISH)) == (400, message)
    assert stored(used_proxy) == EMPTY


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The request body is not a JSON object."),
        (b"[]", "The request body is not a JSON object."),
        (b"{", "The request body is not a JSON object."),
        (b"[" * 200_000, "The request body is not a JSON object."),
        (b'{"messages": ' + b"[" * 200_000, "The request body is not a JSON object."),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "messages[0].content holds characters that are not allowed.",
        ),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "The request body is not a JSON object."),
        (
            b'{"model": "a\\u0000", "messages": [{"role": "user", "content": "x"}]}',
            "model holds characters that are not allowed.",
        ),
        (b'{"model": 1, "messages": [{"role": "user", "content": "x"}]}', "model must be a string."),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_body_that_makes_no_sense_is_refused(used_proxy: LiveProxy, body: bytes, message: str) -> None:
    headers = BEARER | ENGLISH | {"Content-Type": "application/json"}
    assert failed(used_proxy.post(address("s", "/import"), content=body, headers=headers)) == (400, message)
    assert stored(used_proxy) == EMPTY


def test_a_model_may_have_said_more_than_a_user_may_and_nothing(used_proxy: LiveProxy) -> None:
    said = [{"role": "user", "content": "🙂" * 1000}, {"role": "assistant", "content": ""}]
    said += [{"role": "user", "content": "x"}, {"role": "assistant", "content": "密" * 100_000}]
    told(bring(used_proxy, said))
    assert told(used_proxy.get(address("s", "/export"), headers=BEARER))["messages"] == said


def test_a_body_is_json_of_any_framing(used_proxy: LiveProxy) -> None:
    body = json.dumps({"messages": SAID}).encode()

    def post(content_type: str, content: Any = body) -> httpx.Response:
        return used_proxy.post(
            address("s", "/import"), content=content, headers=BEARER | {"Content-Type": content_type}
        )

    assert told(post("application/json", iter([body[:20], body[20:]])))["messageCount"] == 3
    assert told(post("application/json; charset=utf-8", b"\xef\xbb\xbf" + body))["messageCount"] == 3
    for content_type in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"):
        assert post(content_type).status_code == 415


def test_who_invents_keys_cannot_fill_what_all_share(chat_proxy: LiveProxy) -> None:
    invented = {"Authorization": "Bearer sk-invented-0123456789abcdef"}
    status, message = failed(bring(chat_proxy, SAID, headers=invented | ENGLISH))
    assert status == 403
    assert "has never been used here" in message
    assert stored(chat_proxy) == EMPTY
    # A key that the upstream refuses stays unknown; the sandbox's needs no upstream.
    assert told(bring(chat_proxy, SAID, headers={"Authorization": "Bearer sk-sandbox"}))["messageCount"] == 3


def test_who_has_just_conversed_may_import(chat_proxy: LiveProxy) -> None:
    with sibling(chat_proxy, JOURNAL_FLUSH_SECONDS="60", JOURNAL_DIR=str(chat_proxy.var_dir / "slow")) as slow:
        new = "sk-new-here-0123456789abcdefgh"
        assert say(slow, "hi", api_key=new).status_code == 200
        data = told(bring(slow, SAID, session="t", headers={"Authorization": f"Bearer {new}"}))
    assert data["messageCount"] == 3


# At the same time as others


def test_a_session_in_which_a_turn_is_under_way_is_busy(used_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with ExitStack() as stack:
        gate, turn = held_turn(upstream, stack, used_proxy)
        refused = bring(used_proxy, SAID)
        told(bring(used_proxy, SAID, session="t"))
        gate.open()
        assert turn.result().status_code == 200
    assert refused.json() == {"code": 409, "message": "该会话正在处理上一条消息，请稍后再试", "data": None}
    assert int(refused.headers["retry-after"]) > 0
    assert told(used_proxy.get(address("s", "/export"), headers=BEARER))["messages"][0]["content"] == "first"


def test_a_session_that_is_replaced_again_and_again_is_always_whole(used_proxy: LiveProxy) -> None:
    tales = {letter: [{"role": "user", "content": letter}] * count for letter, count in (("a", 40), ("b", 90))}
    told(bring(used_proxy, tales["a"]))
    has_ended = threading.Event()

    def replace() -> list[int]:
        try:
            return [bring(used_proxy, tales["ab"[turn % 2]]).status_code for turn in range(40)]
        finally:
            has_ended.set()

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace)
        while not has_ended.is_set():
            data = told(used_proxy.get(address("s"), headers=BEARER))
            contents = [message["content"] for message in data["messages"]]
            assert contents in (["a"] * 40, ["b"] * 90)
            assert data["messageCount"] == len(contents)
        assert set(replacing.result()) == {200}


@pytest.mark.django_db
def test_a_turn_that_lost_its_session_to_an_import_stores_nothing(settings: Settings) -> None:
    turn = begin()
    said = [Said("user", "imported", 2)]
    with pytest.raises(SessionBusyError):
        services.import_session(caller(), "s", said, model="m", now=NOW)
    settings.SESSION_LEASE_SECONDS = 0.001
    late = begin("t")
    after = late.session.locked_until
    assert after is not None
    for session_id, lost in (("s", turn), ("t", late)):
        lease_end = lost.session.locked_until
        assert lease_end is not None
        services.import_session(caller(), session_id, said, model="m", now=lease_end)
        with pytest.raises(TurnLostError):
            store(lost, "late")
        services.abandon_turn(caller(), session_id, token=lost.token)
        session = ChatSession.objects.get(session_id=session_id)
        assert contents_of(session) == ["imported"]
    assert_sums_are_right()


@pytest.mark.django_db
def test_who_read_a_session_before_an_import_goes_on_from_the_import() -> None:
    take_turn("s", "old")
    services.import_session(caller(), "s", [Said("user", "imported", 2)], model="m", now=NOW)
    turn = begin()
    assert [said.content for said in turn.history] == ["imported"]
    store(turn, "next")
    assert contents_of(ChatSession.objects.get()) == ["imported", "next", "a"]
    assert_sums_are_right()


# Caps


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("cap", "most", "status"),
    [
        ("SESSION_KEY_MAX_SESSIONS", 1, 429),
        ("SESSION_KEY_MAX_MESSAGES", 4, 429),
        ("SESSION_KEY_MAX_BYTES", 300, 429),
        ("SESSION_ALL_MAX_SESSIONS", 1, 503),
        ("SESSION_ALL_MAX_MESSAGES", 4, 503),
        ("SESSION_ALL_MAX_BYTES", 300, 503),
    ],
)
def test_an_import_beyond_a_cap_changes_nothing(settings: Settings, cap: str, most: int, status: int) -> None:
    take_turn("s", "kept")
    setattr(settings, cap, most)
    said = [Said("user", "x" * 50, 2)] * 3
    with pytest.raises(ProError) as refused:
        services.import_session(caller(), "t", said, model="m", now=NOW)
    assert refused.value.status == status
    assert contents_of(ChatSession.objects.get()) == ["kept", "re: kept"]
    assert_sums_are_right()
    # What is replaced makes room, and so does what has expired.
    services.import_session(caller(), "s", said[:2], model="m", now=NOW)
    services.import_session(caller(), "t", said, model="m", now=ChatSession.objects.get().expires_at)
    assert [session.session_id for session in ChatSession.objects.all()] == ["t"]
    assert ChatMessage.objects.count() == 3
    assert_sums_are_right()


@pytest.mark.django_db
def test_an_expired_session_is_replaced_like_any_other() -> None:
    take_turn("s", "old")
    expired = ChatSession.objects.get().expires_at
    services.import_session(caller(), "s", [Said("user", "new", 2)], model="m", now=expired)
    session, messages = selectors.history_of(caller().fingerprint, "s", api_key=API_KEY.encode(), now=expired) or (
        None,
        [],
    )
    assert session is not None
    assert [message.said.content for message in messages] == ["new"]
    assert_sums_are_right()
