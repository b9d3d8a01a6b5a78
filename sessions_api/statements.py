"""The statements of every turn, by hand: to build one with Django's ORM takes ten times as long as to run it.

Each is the same on SQLite and PostgreSQL. Times are compared in the database, which has its own form of them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import NamedTuple

from django.db import connection

from sessions_api.models import ChatHolding, ChatMessage, ChatSession

_SESSIONS, _MESSAGES, _HOLDINGS = (model._meta.db_table for model in (ChatSession, ChatMessage, ChatHolding))
_ADDED = ", ".join(
    [f"{name} = {_HOLDINGS}.{name} + excluded.{name}" for name in ("sessions", "messages", "size_bytes")]
)
_FREE = "(lock_token = '' OR locked_until IS NULL OR locked_until <= %s)"


class Found(NamedTuple):
    """A session as it is now; `session` has only the fields that turns need."""

    session: ChatSession
    is_live: bool
    is_locked: bool


class Held(NamedTuple):
    """How much one key holds, or all do."""

    key_fingerprint: str
    sessions: int
    messages: int
    size_bytes: int


class Row(NamedTuple):
    """One stored message."""

    position: int
    role: str
    content: bytes
    tokens: int


def find_session(key_fingerprint: str, session_id: str, now: dt.datetime) -> Found | None:
    moment = _moment(now)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, incarnation, is_sealed, message_count, size_bytes, lock_token, "  # noqa: S608 - tables' names
            "message_count > 0 AND expires_at > %s, lock_token <> '' AND locked_until > %s "
            f"FROM {_SESSIONS} WHERE key_fingerprint = %s AND session_id = %s",
            [moment, moment, key_fingerprint, session_id],
        )
        row = cursor.fetchone()
    if row is None:
        return None
    pk, incarnation, is_sealed, message_count, size_bytes, lock_token, is_live, is_locked = row
    session = ChatSession(
        pk=pk,
        key_fingerprint=key_fingerprint,
        session_id=session_id,
        incarnation=incarnation,
        is_sealed=bool(is_sealed),
        message_count=message_count,
        size_bytes=size_bytes,
        lock_token=lock_token,
    )
    return Found(session, bool(is_live), bool(is_locked))


def take_session(session: ChatSession, *, token: str, until: dt.datetime, now: dt.datetime) -> bool:
    """Write a lease into the row if it is free and nobody has begun or ended a turn since it was read."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {_SESSIONS} SET lock_token = %s, locked_until = %s WHERE id = %s AND incarnation = %s "  # noqa: S608
            f"AND message_count = %s AND lock_token = %s AND {_FREE}",
            [
                token,
                _moment(until),
                session.pk,
                session.incarnation,
                session.message_count,
                session.lock_token,
                _moment(now),
            ],
        )
        return bool(cursor.rowcount == 1)


def holdings_of(key_fingerprint: str) -> list[Held]:
    """Return what the key holds, and what all do, where there is anything."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT key_fingerprint, sessions, messages, size_bytes FROM {_HOLDINGS} "  # noqa: S608
            "WHERE key_fingerprint IN (%s, %s)",
            [key_fingerprint, ChatHolding.ALL_KEYS],
        )
        return [Held(*row) for row in cursor.fetchall()]


def messages_from(session: ChatSession, position: int) -> list[Row]:
    """Return the messages from that position on, in order, after a system message that the session begins with."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT position, role, content, tokens FROM {_MESSAGES} "  # noqa: S608
            "WHERE session_id = %s AND (position >= %s OR position = 0 AND role = 'system') ORDER BY position",
            [session.pk, position],
        )
        return [Row(*row) for row in cursor.fetchall()]


def append_messages(
    session: ChatSession, token: str, messages: Sequence[Row], *, model: str, now: dt.datetime, expires_at: dt.datetime
) -> bool:
    """Add messages to a session and end its lease, within the caller's transaction; False if it is not held."""
    moment = _moment(now)
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {_SESSIONS} SET model = %s, message_count = message_count + %s, tokens = tokens + %s, "  # noqa: S608
            "size_bytes = size_bytes + %s, last_message_at = %s, expires_at = %s, lock_token = '', "
            "locked_until = NULL WHERE id = %s AND lock_token = %s",
            [
                model,
                len(messages),
                sum(message.tokens for message in messages),
                sum(len(message.content) for message in messages),
                moment,
                _moment(expires_at),
                session.pk,
                token,
            ],
        )
        if cursor.rowcount != 1:
            return False
        cursor.executemany(
            f"INSERT INTO {_MESSAGES} (session_id, position, role, content, tokens, created_at) "  # noqa: S608
            "VALUES (%s, %s, %s, %s, %s, %s)",
            [[session.pk, *message, moment] for message in messages],
        )
    return True


def delete_messages(session_ids: Sequence[int]) -> None:
    """Remove all messages of these sessions, within the caller's transaction."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            # Until it has looked at what is in a table, it takes some hundred sessions for half of all messages.
            cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute(
            f"DELETE FROM {_MESSAGES} WHERE session_id IN ({_places(session_ids)})",  # noqa: S608
            session_ids,
        )


def delete_sessions(session_ids: Sequence[int]) -> None:
    """Remove these sessions with their messages, within the caller's transaction."""
    delete_messages(session_ids)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            # Foreign keys are looked at now, not at the end: nobody shall wait for that.
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute(f"DELETE FROM {_SESSIONS} WHERE id IN ({_places(session_ids)})", session_ids)  # noqa: S608


def change_holdings(changes: Sequence[Held]) -> None:
    """Add to what each of these keys holds, in this order, within the caller's transaction."""
    rows = ", ".join([f"({_places(change)})" for change in changes])
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {_HOLDINGS} (key_fingerprint, sessions, messages, size_bytes) VALUES {rows} "  # noqa: S608
            f"ON CONFLICT (key_fingerprint) DO UPDATE SET {_ADDED}",
            [value for change in changes for value in change],
        )


def add_within(change: Held, caps: Held) -> bool:
    """Add to what a key holds, within the caller's transaction; False, and nothing added, beyond a cap."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {_HOLDINGS} (key_fingerprint, sessions, messages, size_bytes) VALUES (%s, %s, %s, %s) "  # noqa: S608
            f"ON CONFLICT (key_fingerprint) DO UPDATE SET {_ADDED} "
            f"WHERE (excluded.sessions = 0 OR {_HOLDINGS}.sessions + excluded.sessions <= %s) "
            f"AND {_HOLDINGS}.messages + excluded.messages <= %s "
            f"AND {_HOLDINGS}.size_bytes + excluded.size_bytes <= %s",
            [*change, *caps[1:]],
        )
        return bool(cursor.rowcount == 1)


def delete_empty_holdings(key_fingerprints: Sequence[str]) -> None:
    """Forget those of the keys that hold nothing, within the caller's transaction."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"DELETE FROM {_HOLDINGS} WHERE sessions <= 0 AND key_fingerprint IN ({_places(key_fingerprints)})",  # noqa: S608
            key_fingerprints,
        )


def _places(values: Sequence[object]) -> str:
    return ", ".join(["%s"] * len(values))


def _moment(time: dt.datetime) -> str | None:
    """Return a time as the database compares it."""
    return connection.ops.adapt_datetimefield_value(time)
