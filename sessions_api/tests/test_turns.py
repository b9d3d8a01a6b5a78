"""Turns in the database: who may have one, what is stored of it, and when a session is nothing any more."""

from __future__ import annotations

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from proxysite.envelope import ProError
from sessions_api import selectors, services
from sessions_api.context import Said
from sessions_api.models import ChatHolding, ChatMessage, ChatSession
from sessions_api.sealing import UnreadableError
from sessions_api.tests.conversations import NOW, begin, caller, contents_of, store, take_turn
from sessions_api.turns import SessionBusyError, TurnLostError, new_token

pytestmark = pytest.mark.django_db
OTHER = "sk-another-0123456789abcdef"


def later(seconds: float) -> dt.datetime:
    return NOW + dt.timedelta(seconds=seconds)


def holding(who: str) -> tuple[int, int, int]:
    found = ChatHolding.objects.filter(pk=who).first()
    return (found.sessions, found.messages, found.size_bytes) if found else (0, 0, 0)


def counted() -> dict[str, tuple[int, int, int]]:
    """Return what the holdings should be, by counting."""
    counts: dict[str, Any] = {}
    for session in ChatSession.objects.filter(message_count__gt=0):
        messages = list(ChatMessage.objects.filter(session=session))
        assert session.message_count == len(messages)
        assert session.size_bytes == sum(len(message.content) for message in messages)
        assert session.tokens == sum(message.tokens for message in messages)
        for who in (session.key_fingerprint, ""):
            before = counts.get(who, (0, 0, 0))
            counts[who] = (before[0] + 1, before[1] + len(messages), before[2] + session.size_bytes)
    return counts


def assert_sums_are_right() -> None:
    expected = counted()
    for who in {*expected, *ChatHolding.objects.values_list("pk", flat=True)}:
        assert holding(who) == expected.get(who, (0, 0, 0))


# One turn after the other


def test_the_next_turn_knows_what_was_said() -> None:
    take_turn("s", "one")
    turn = begin()
    assert turn.history == [Said("user", "one", 3), Said("assistant", "re: one", 7)]
    store(turn, "two")
    assert contents_of(ChatSession.objects.get()) == ["one", "re: one", "two", "a"]
    assert list(ChatMessage.objects.values_list("position", "role")) == [
        (0, "user"),
        (1, "assistant"),
        (2, "user"),
        (3, "assistant"),
    ]
    assert_sums_are_right()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_session_is_busy_until_its_turn_is_stored_or_abandoned(is_new: bool) -> None:
    if not is_new:
        take_turn("s", "one")
    turn = begin()
    with pytest.raises(SessionBusyError):
        begin()
    begin("other")
    begin(who=caller(OTHER))
    services.abandon_turn(caller(), "s", token=turn.token)
    turn = begin()
    store(turn, "two")
    begin()


def test_an_abandoned_first_turn_leaves_nothing() -> None:
    services.abandon_turn(caller(), "s", token=begin().token)
    assert not ChatSession.objects.exists()
    assert_sums_are_right()


def test_an_abandoned_turn_takes_nothing_away() -> None:
    take_turn("s", "one")
    services.abandon_turn(caller(), "s", token=begin().token)
    assert contents_of(ChatSession.objects.get()) == ["one", "re: one"]


def test_nobody_abandons_the_turn_of_another() -> None:
    begin()
    services.abandon_turn(caller(), "s", token=new_token())
    with pytest.raises(SessionBusyError):
        begin()


def test_a_lease_ends_by_itself(settings: Settings) -> None:
    settings.SESSION_LEASE_SECONDS = 30
    lost = begin()
    with pytest.raises(SessionBusyError):
        begin(now=later(29))
    turn = begin(now=later(30))
    with pytest.raises(TurnLostError):
        store(lost, "too late", now=later(31))
    assert not ChatMessage.objects.exists()
    store(turn, "in time", now=later(31))
    assert contents_of(ChatSession.objects.get()) == ["in time", "a"]


def test_a_late_turn_is_stored_if_nobody_came() -> None:
    take_turn("s", "one")
    turn = begin(now=later(1))
    store(turn, "two", now=later(5000))
    assert begin(now=later(5001)).history[2].content == "two"


def test_renewed_leases_last(settings: Settings) -> None:
    settings.SESSION_LEASE_SECONDS = 30
    turns = [begin("a"), begin("b")]
    services.abandon_turn(caller(), "b", token=turns[1].token)
    assert services.renew_leases(turns, now=later(20)) == 1
    with pytest.raises(SessionBusyError):
        begin("a", now=later(49))
    begin("a", now=later(50))
    begin("b", now=later(20))


def test_a_deleted_session_stores_nothing() -> None:
    take_turn("s", "one")
    turn = begin()
    assert services.delete_session(caller().fingerprint, "s", now=NOW)
    with pytest.raises(TurnLostError):
        store(turn, "two")
    assert not ChatMessage.objects.exists()
    assert_sums_are_right()


@pytest.mark.django_db(transaction=True)
def test_of_many_at_once_one_gets_the_session() -> None:
    for is_new in (True, False):
        if not is_new:
            take_turn("s", "one", now=timezone.now())
        ready = threading.Barrier(8)

        def attempt(_: int, ready: threading.Barrier = ready) -> str:
            try:
                ready.wait()
                return begin(now=timezone.now()).token
            except SessionBusyError:
                return ""
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as pool:
            tokens = [token for token in pool.map(attempt, range(8)) if token]
        assert len(tokens) == 1
        services.abandon_turn(caller(), "s", token=tokens[0])


# Expiry


def test_a_session_expires_after_its_last_message(settings: Settings) -> None:
    settings.SESSION_TTL_SECONDS = 1800
    take_turn("s", "one")
    take_turn("s", "two", now=later(1799))
    fingerprint = caller().fingerprint
    assert selectors.session_of_key(fingerprint, "s", later(1799 + 1799))
    assert selectors.session_of_key(fingerprint, "s", later(1799 + 1800)) is None
    assert list(selectors.live_sessions(later(1799 + 1800))) == []


def test_an_expired_session_starts_afresh_and_its_old_messages_go() -> None:
    old = take_turn("s", "one").session
    turn = begin(now=later(1800))
    assert turn.history == []
    assert not ChatMessage.objects.exists()
    assert_sums_are_right()
    store(turn, "two", now=later(1800))
    fresh = ChatSession.objects.get()
    assert fresh.incarnation != old.incarnation
    assert (fresh.created_at, fresh.message_count) == (later(1800), 2)
    assert_sums_are_right()


def test_a_message_of_an_earlier_life_cannot_be_put_back() -> None:
    take_turn("s", "one")
    before = bytes(ChatMessage.objects.get(position=0).content)
    take_turn("s", "two", now=later(1800))
    ChatMessage.objects.filter(position=0).update(content=before)
    for _ in range(2):  # and the session is not left busy
        with pytest.raises(UnreadableError):
            begin(now=later(1801))


def test_a_session_in_its_first_turn_is_nowhere_to_be_seen() -> None:
    begin()
    assert list(selectors.sessions_of_key(caller().fingerprint, NOW)) == []


# Keys


def test_keys_never_meet() -> None:
    take_turn("s", "mine")
    take_turn("s", "yours", who=caller(OTHER))
    assert [said.content for said in begin().history] == ["mine", "re: mine"]
    assert selectors.sessions_of_key(caller(OTHER).fingerprint, NOW).count() == 1
    assert not services.delete_session(caller(OTHER).fingerprint, "t", now=NOW)
    assert services.delete_sessions_of_key(caller(OTHER).fingerprint) == 1
    assert ChatSession.objects.get().key_fingerprint == caller().fingerprint
    assert_sums_are_right()


# Caps


def refusal(act: Any) -> ProError:
    with pytest.raises(ProError) as raised:
        act()
    return raised.value


@pytest.mark.parametrize(
    ("cap", "most", "status"),
    [
        ("SESSION_KEY_MAX_SESSIONS", 2, 429),
        ("SESSION_KEY_MAX_MESSAGES", 4, 429),
        ("SESSION_ALL_MAX_SESSIONS", 2, 503),
        ("SESSION_ALL_MAX_MESSAGES", 4, 503),
    ],
)
def test_a_cap_is_told_before_the_turn(settings: Settings, cap: str, most: int, status: int) -> None:
    setattr(settings, cap, most)
    for name in ("a", "b"):
        take_turn(name, "x")
    assert refusal(lambda: begin("c")).status == status
    if status == 429:
        take_turn("c", "x", who=caller(OTHER))
    assert services.delete_session(caller().fingerprint, "a", now=NOW)
    if status == 429:
        begin("c")


def test_a_session_has_a_cap_of_its_own(settings: Settings) -> None:
    settings.SESSION_MAX_MESSAGES = 5
    for _ in range(2):
        take_turn("s", "x")
    assert refusal(begin).status == 429
    begin("t")


@pytest.mark.parametrize(("cap", "status"), [("SESSION_KEY_MAX_BYTES", 429), ("SESSION_ALL_MAX_BYTES", 503)])
def test_a_turn_that_would_take_too_many_bytes_is_not_stored(settings: Settings, cap: str, status: int) -> None:
    setattr(settings, cap, 2000)
    take_turn("s", "x" * 500)
    turn = begin()
    before = list(ChatHolding.objects.order_by("pk").values())
    assert refusal(lambda: store(turn, "y" * 1000)).status == status
    assert list(ChatHolding.objects.order_by("pk").values()) == before
    assert ChatMessage.objects.count() == 2
    services.abandon_turn(caller(), "s", token=turn.token)
    assert refusal(lambda: store(begin("t"), "y" * 2001)).status == status
    assert_sums_are_right()


@pytest.mark.parametrize("cap", ["SESSION_KEY_MAX_SESSIONS", "SESSION_ALL_MAX_SESSIONS"])
def test_what_has_expired_takes_no_room(settings: Settings, cap: str) -> None:
    setattr(settings, cap, 1)
    take_turn("old", "x")
    take_turn("new", "x", now=later(1800))
    assert [session.session_id for session in ChatSession.objects.all()] == ["new"]
    assert_sums_are_right()


def test_a_turn_costs_the_same_however_much_is_held() -> None:
    counts = []
    for number in range(2):
        for other in range(20):
            take_turn(f"{number}-{other}", "x")
        take_turn("s", "x")
        with CaptureQueriesContext(connection) as queries:
            take_turn("s", "x")
        counts.append([query["sql"].split(" ")[0] for query in queries if "SAVEPOINT" not in query["sql"]])
        assert not [query["sql"] for query in queries if "COUNT(" in query["sql"]]
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 8
