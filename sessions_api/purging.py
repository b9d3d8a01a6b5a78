"""The end of conversations: expired ones by the thousand, or those that somebody asks to delete."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from django.db import connection
from django.db.models import Q, QuerySet
from django.utils import timezone

from sessions_api import holdings, statements
from sessions_api.holdings import Amount
from sessions_api.models import ChatSession
from sessions_api.transactions import in_transaction

_CHUNK_MESSAGES = 2000
_CHUNK_SESSIONS = 200
_LOOK_AHEAD_SESSIONS = 10_000
_SOME_SESSIONS = 20
# Of the time that a chunk took. SQLite has one writer at a time, and those who wait look only now and then.
_PAUSES = {"sqlite": 1.0, "postgresql": 0.1}


def purge_expired_sessions(
    *,
    now: dt.datetime | None = None,
    chunk_messages: int = _CHUNK_MESSAGES,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Remove the sessions that have expired, with all that was said in them, and return how many those were.

    In chunks of so many messages, each a short transaction, with pauses between them for everybody else. A
    session in which a turn is under way stays. Two who purge at a time share the work.
    """
    expired = _expired(now or timezone.now())
    return _remove_all(expired, chunk_messages=chunk_messages, waits=False, progress=progress)


def purge_some(key_fingerprint: str | None, *, now: dt.datetime) -> int:
    """Remove a few expired sessions, of one key or of all, where room is needed at once; return how many."""
    expired = _expired(now)
    if key_fingerprint is not None:
        expired = expired.filter(key_fingerprint=key_fingerprint)
    ids = list(expired.values_list("pk", flat=True)[:_SOME_SESSIONS])
    return _remove_chunk(expired, ids, waits=False) if ids else 0


def delete_session(key_fingerprint: str, session_id: str, *, now: dt.datetime) -> bool:
    """Remove a session of that key, a turn under way in it notwithstanding; return whether there was a live one."""
    found = ChatSession.objects.filter(key_fingerprint=key_fingerprint, session_id=session_id)
    was_live = any(session.is_live(now) for session in found)
    _remove_all(found.order_by("pk"))
    return was_live


def delete_sessions_of_key(key_fingerprint: str) -> int:
    """Remove all sessions of that key; return how many there were."""
    return _remove_all(ChatSession.objects.filter(key_fingerprint=key_fingerprint).order_by("pk"))


def delete_sessions(ids: Collection[int]) -> int:
    """Remove these sessions, by primary key; return how many there were."""
    return _remove_all(ChatSession.objects.filter(pk__in=ids).order_by("pk"))


def _expired(now: dt.datetime) -> QuerySet[ChatSession]:
    is_free = Q(lock_token="") | Q(locked_until=None) | Q(locked_until__lte=now)
    return ChatSession.objects.filter(is_free, expires_at__lte=now).order_by("expires_at")


def _remove_all(
    sessions: QuerySet[ChatSession],
    *,
    chunk_messages: int = _CHUNK_MESSAGES,
    waits: bool = True,
    progress: Callable[[int], None] | None = None,
) -> int:
    removed = 0
    while True:
        # Looked up far ahead: where many rows have just been removed, each look walks over what is left of them.
        found = list(sessions.values_list("pk", "message_count")[:_LOOK_AHEAD_SESSIONS])
        removed_before = removed
        for ids in _chunks(found, chunk_messages):
            began_s = time.monotonic()
            count = _remove_chunk(sessions, ids, waits=waits)
            removed += count
            if progress is not None:
                progress(count)
            time.sleep((time.monotonic() - began_s) * _PAUSES[connection.vendor])
        if removed == removed_before:
            return removed


def _chunks(found: Iterable[tuple[int, int]], most_messages: int) -> Iterator[list[int]]:
    """Yield the ids of sessions that have at most so many messages together, or of one that has more."""
    ids: list[int] = []
    messages = 0
    for pk, count in found:
        if ids and (messages + count > most_messages or len(ids) == _CHUNK_SESSIONS):
            yield ids
            ids, messages = [], 0
        ids.append(pk)
        messages += count
    if ids:
        yield ids


def _remove_chunk(sessions: QuerySet[ChatSession], ids: Collection[int], *, waits: bool) -> int:
    """Remove those of the sessions in one transaction; return how many.

    Without `waits`, rows that somebody else works on just now are left for the next time.
    """
    return in_transaction(partial(_remove, sessions.filter(pk__in=ids).order_by("pk"), waits=waits))


def _remove(sessions: QuerySet[ChatSession], *, waits: bool) -> int:
    rows = list(
        sessions.select_for_update(skip_locked=not waits).values_list(
            "pk", "key_fingerprint", "message_count", "size_bytes"
        )
    )
    if rows:
        statements.delete_sessions([pk for pk, *_ in rows])
        holdings.subtract((key, Amount(int(count > 0), count, size)) for _, key, count, size in rows)
    return len(rows)
