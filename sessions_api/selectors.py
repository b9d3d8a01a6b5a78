"""Every question to the conversations. What has expired is nowhere in an answer."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import NamedTuple

from django.db.models import Q, QuerySet

from sessions_api.context import Said
from sessions_api.models import ChatMessage, ChatSession
from sessions_api.sealing import UnreadableError, sealer_for


@dataclass(frozen=True, slots=True)
class Remembered:
    """One message, and when it was said."""

    said: Said
    created_at: dt.datetime


class Place(NamedTuple):
    """Where a session stands among those of its key."""

    last_message_at: dt.datetime
    session_id: str


def live_sessions(now: dt.datetime) -> QuerySet[ChatSession]:
    """Return the sessions in which something is remembered, of all keys, those longest to live first."""
    return ChatSession.objects.filter(expires_at__gt=now, message_count__gt=0).order_by("-expires_at", "-pk")


def sessions_of_key(key_fingerprint: str, now: dt.datetime) -> QuerySet[ChatSession]:
    """Return the live sessions of one key, the newest message first."""
    return live_sessions(now).filter(key_fingerprint=key_fingerprint)


def session_of_key(key_fingerprint: str, session_id: str, now: dt.datetime) -> ChatSession | None:
    """Return a live session, None for one that is another key's, has expired, or never was."""
    return sessions_of_key(key_fingerprint, now).filter(session_id=session_id).first()


def page_of_sessions(
    key_fingerprint: str, now: dt.datetime, *, after: Place | None, limit: int
) -> tuple[list[ChatSession], Place | None]:
    """Return the live sessions of one key that come after a place, at most `limit`, and the place of the last one.

    The one with the newest message is first. The place is None where nothing follows.
    """
    found = sessions_of_key(key_fingerprint, now).order_by("-last_message_at", "-session_id")
    if after is not None:
        is_later = Q(last_message_at=after.last_message_at, session_id__lt=after.session_id)
        found = found.filter(Q(last_message_at__lt=after.last_message_at) | is_later)
    page = list(found[: limit + 1])
    if len(page) <= limit:
        return page, None
    return page[:limit], Place(page[limit - 1].last_message_at, page[limit - 1].session_id)


def history_of(
    key_fingerprint: str, session_id: str, *, api_key: bytes, now: dt.datetime
) -> tuple[ChatSession, list[Remembered]] | None:
    """Return a live session and all that was said in it, as at one moment; None as `session_of_key` does.

    Raises UnreadableError.
    """
    session = session_of_key(key_fingerprint, session_id, now)
    while session is not None:
        unreadable = None
        messages: list[Remembered] = []
        try:
            messages = messages_of(session, api_key=api_key)
        except UnreadableError as exc:
            unreadable = exc
        again = session_of_key(key_fingerprint, session_id, now)
        if again is not None and again.incarnation == session.incarnation:
            if unreadable is not None:
                raise unreadable
            # A turn may have been stored since.
            return session, messages[: session.message_count]
        # What was read is of two sessions: another has taken the place of the first.
        session = again
    return None


def has_turn_under_way(key_fingerprint: str, session_id: str, now: dt.datetime) -> bool:
    """Return whether a message of that session is being answered, be it the first one."""
    held = ChatSession.objects.filter(locked_until__gt=now).exclude(lock_token="")
    return held.filter(key_fingerprint=key_fingerprint, session_id=session_id).exists()


def messages_of(session: ChatSession, *, api_key: bytes | None = None) -> list[Remembered]:
    """Return what was said in a session, in order.

    A sealed session opens with its caller's API key only. Raises SealedError without it, UnreadableError.
    """
    sealer = sealer_for(session, api_key=api_key)
    rows = ChatMessage.objects.filter(session=session).order_by("position")
    return [
        Remembered(Said(role, sealer.open(content, position=position, role=role), tokens), created_at)
        for position, role, content, tokens, created_at in rows.values_list(
            "position", "role", "content", "tokens", "created_at"
        )
    ]
