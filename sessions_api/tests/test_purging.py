"""The end of conversations: what goes, what stays, and that nobody has to wait for it."""

from __future__ import annotations

import datetime as dt
import threading
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils import timezone
from pytest_django import Settings

from sessions_api import services, tasks
from sessions_api.models import ChatHolding, ChatMessage, ChatSession
from sessions_api.sealing import sealer_for
from sessions_api.tests.conversations import NOW, begin, caller, contents_of, store, take_turn
from sessions_api.tests.test_turns import assert_sums_are_right, later

pytestmark = pytest.mark.django_db
LONG_AGO = NOW - dt.timedelta(days=1)


def names() -> list[str]:
    return list(ChatSession.objects.order_by("session_id").values_list("session_id", flat=True))


def run(*arguments: str) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out)
    return out.getvalue()


def test_expired_sessions_go_with_their_messages_and_others_stay() -> None:
    take_turn("gone", "x", now=LONG_AGO)
    take_turn("just gone", "x", now=later(-1800))
    take_turn("stays", "x", now=later(-1799))
    assert services.purge_expired_sessions(now=NOW) == 2
    assert names() == ["stays"]
    assert ChatMessage.objects.count() == 2
    assert_sums_are_right()
    assert services.purge_expired_sessions(now=NOW) == 0


def test_a_key_that_holds_nothing_is_forgotten() -> None:
    take_turn("gone", "x", now=LONG_AGO)
    services.purge_expired_sessions(now=NOW)
    assert list(ChatHolding.objects.values_list("pk", "sessions", "messages", "size_bytes")) == [("", 0, 0, 0)]


def test_a_session_stays_while_its_turn_is_under_way() -> None:
    take_turn("s", "one")
    turn = begin(now=later(1799))
    services.renew_leases([turn], now=later(1900))
    begin("first", now=later(1900))
    assert services.purge_expired_sessions(now=later(1901)) == 0
    store(turn, "two", now=later(1901))
    assert contents_of(ChatSession.objects.get(session_id="s"))[2] == "two"


def test_what_a_dead_worker_left_goes_too() -> None:
    begin("never said anything")
    assert services.purge_expired_sessions(now=later(3600)) == 1
    assert_sums_are_right()


def test_it_goes_in_chunks() -> None:
    for number in range(10):
        for _ in range(1 + number % 5):
            take_turn(f"s{number}", "x", now=LONG_AGO)
    chunks: list[int] = []
    assert services.purge_expired_sessions(now=NOW, chunk_messages=15, progress=chunks.append) == 10
    assert sum(chunks) == 10
    assert len(chunks) > 3
    assert not ChatMessage.objects.exists()
    assert_sums_are_right()


@pytest.mark.django_db(transaction=True)
def test_a_purge_does_not_wait_for_a_session_that_somebody_works_on() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one writer at a time")
    for name in ("busy", "free"):
        take_turn(name, "x", now=LONG_AGO)
    is_held, is_purged = threading.Event(), threading.Event()

    def work() -> None:
        with transaction.atomic():
            ChatSession.objects.select_for_update().get(session_id="busy")
            is_held.set()
            is_purged.wait(60)
        connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert is_held.wait(60)
    assert services.purge_expired_sessions(now=NOW) == 1
    is_purged.set()
    thread.join()
    assert services.purge_expired_sessions(now=NOW) == 1


def test_an_owner_deletes_one_or_all() -> None:
    for name in ("a", "b", "c"):
        take_turn(name, "x")
    fingerprint = caller().fingerprint
    assert services.delete_session(fingerprint, "a", now=NOW)
    assert not services.delete_session(fingerprint, "a", now=NOW)
    assert not services.delete_session(fingerprint, "b", now=later(1800))
    assert services.delete_sessions_of_key(fingerprint) == 1
    assert not ChatMessage.objects.exists()
    assert_sums_are_right()


def test_the_task_and_the_command_do_the_same() -> None:
    take_turn("a", "x", now=timezone.now() - dt.timedelta(hours=1))
    tasks.purge_sessions()
    assert names() == []
    take_turn("b", "x", now=timezone.now() - dt.timedelta(hours=1))
    take_turn("c", "x", now=timezone.now())
    assert run("purge_sessions") == "1 conversations removed.\n"
    assert names() == ["c"]


# Secrets


def test_a_rotation_leaves_nothing_to_the_old_secret(settings: Settings) -> None:
    old, new = "old-secret-" * 4, "new-secret-" * 4
    settings.SESSION_KEYS = [old]
    for name in ("a", "b"):
        take_turn(name, name)
    settings.SESSION_SEALED = True
    take_turn("sealed", "x")
    sealed_before = bytes(ChatMessage.objects.get(session__session_id="sealed", position=0).content)
    settings.SESSION_SEALED = False
    settings.SESSION_KEYS = [new, old]
    take_turn("a", "newer")
    assert run("rotate_session_keys") == "6 messages looked at, 4 encrypted anew.\n"
    assert run("rotate_session_keys") == "6 messages looked at, 0 encrypted anew.\n"
    settings.SESSION_KEYS = [new]
    assert contents_of(ChatSession.objects.get(session_id="a")) == ["a", "re: a", "newer", "re: newer"]
    assert contents_of(ChatSession.objects.get(session_id="b")) == ["b", "re: b"]
    assert bytes(ChatMessage.objects.get(session__session_id="sealed", position=0).content) == sealed_before


def test_a_rotation_says_what_no_secret_opens(settings: Settings) -> None:
    take_turn("s", "x")
    settings.SESSION_KEYS = ["another-secret-" * 4]
    with pytest.raises(CommandError, match="2 messages"):
        run("rotate_session_keys")


def test_a_rotation_goes_through_all_chunks(settings: Settings) -> None:
    for _ in range(5):
        take_turn("s", "x")
    settings.SESSION_KEYS = ["another-secret-" * 4, *settings.SESSION_KEYS]
    assert services.rotate_session_keys(chunk_messages=3).changed == 10
    sealer = sealer_for(ChatSession.objects.get())
    assert all(sealer.is_current(message.content) for message in ChatMessage.objects.all())
