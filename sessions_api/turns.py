"""One turn of a conversation in the database: the session taken, what was said read, both messages stored or neither.

Who takes a session writes a lease into its row, by an UPDATE that only succeeds on the row as it was read. The lease
ends by itself; until then nobody else begins a turn there, on whatever machine. Clocks of machines may differ by some
seconds, not by as much as SESSION_LEASE_SECONDS.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from django.conf import settings
from django.db import IntegrityError, transaction

from proxysite.envelope import ProError
from sessions_api import holdings, statements, wording
from sessions_api.context import Said
from sessions_api.holdings import Amount
from sessions_api.models import ChatSession
from sessions_api.purging import purge_some
from sessions_api.sealing import UnreadableError, sealer_for
from sessions_api.transactions import in_transaction

_ATTEMPTS = 4


class SessionBusyError(Exception):
    """Somebody else's turn is under way."""


class TurnLostError(Exception):
    """The session was deleted, or somebody else has taken it after the lease had ended."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the key itself, and what may be written down of it."""

    api_key: bytes
    fingerprint: str
    hint: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A session that is ours until the lease ends, and what has been said in it, oldest first."""

    session: ChatSession
    token: str
    history: Sequence[Said]


def new_token() -> str:
    """Return what a lease is known by."""
    return secrets.token_hex(16)


def begin_turn(caller: Caller, session_id: str, *, model: str, token: str, now: dt.datetime) -> Turn:
    """Take the caller's session of that name, a new one if there is none or it has expired.

    Raises SessionBusyError; ProError where a cap is reached; UnreadableError.
    """
    for _ in range(_ATTEMPTS):
        found = statements.find_session(caller.fingerprint, session_id, now)
        if found is not None and found.is_locked:
            raise SessionBusyError
        _check_caps(caller, found.session if found is not None and found.is_live else None, now)
        if found is None:
            ours = _created(caller, session_id, model=model, token=token, now=now)
        elif found.is_live:
            ours = _taken(found.session, token=token, now=now)
        else:
            ours = _begun_afresh(found.session, token=token, now=now)
        if ours is not None:
            return Turn(ours, token, _history_or_nothing_begun(ours, caller, token))
    raise SessionBusyError


def store_turn(turn: Turn, said: Iterable[Said], *, caller: Caller, model: str, now: dt.datetime) -> None:
    """Append what was said, all of it or nothing, and end the lease.

    Raises TurnLostError; ProError where a cap is reached.
    """
    session = turn.session
    sealer = sealer_for(session, api_key=caller.api_key)
    messages = [
        statements.Row(
            position,
            each.role,
            sealer.seal(each.content, position=position, role=each.role),
            each.tokens,
        )
        for position, each in enumerate(said, start=session.message_count)
    ]
    size_bytes = sum(len(message.content) for message in messages)
    expires_at = now + dt.timedelta(seconds=settings.SESSION_TTL_SECONDS)

    def store() -> None:
        if not statements.append_messages(session, turn.token, messages, model=model, now=now, expires_at=expires_at):
            raise TurnLostError
        is_first = session.message_count == 0
        holdings.add(session.key_fingerprint, Amount(int(is_first), len(messages), size_bytes))

    in_transaction(store)


def abandon_turn(caller: Caller, session_id: str, *, token: str) -> None:
    """End the lease, if it is still ours; a session in which nothing was ever said goes with it."""
    held = ChatSession.objects.filter(key_fingerprint=caller.fingerprint, session_id=session_id, lock_token=token)
    if not held.filter(message_count=0).delete()[0]:
        held.update(lock_token="", locked_until=None)


def renew_leases(turns: Sequence[Turn], *, now: dt.datetime) -> int:
    """Put off the end of these leases, in one statement; return how many are still ours."""
    return ChatSession.objects.filter(
        pk__in=[turn.session.pk for turn in turns], lock_token__in=[turn.token for turn in turns]
    ).update(locked_until=_lease_end(now))


def _check_caps(caller: Caller, session: ChatSession | None, now: dt.datetime) -> None:
    """Raise ProError where there is no room for a turn, before it has cost anything."""
    if session is not None and session.message_count + 2 > settings.SESSION_MAX_MESSAGES:
        raise ProError(429, wording.session_full(settings.SESSION_MAX_MESSAGES))
    more = Amount(int(session is None), 2, 1)
    try:
        holdings.check_room(caller.fingerprint, more)
    except ProError as full:
        # What has expired takes no room, whether or not a purge has run.
        if not purge_some(caller.fingerprint if full.status == 429 else None, now=now):
            raise
        holdings.check_room(caller.fingerprint, more)


def _created(caller: Caller, session_id: str, *, model: str, token: str, now: dt.datetime) -> ChatSession | None:
    session = ChatSession(
        key_fingerprint=caller.fingerprint,
        key_hint=caller.hint,
        session_id=session_id,
        model=model,
        **_fresh(token=token, now=now),
    )
    try:
        with transaction.atomic():
            session.save(force_insert=True)
    except IntegrityError:  # somebody else was quicker
        return None
    return session


def _taken(session: ChatSession, *, token: str, now: dt.datetime) -> ChatSession | None:
    """Return the session with our lease, None if it is no longer as it was read."""
    is_ours = statements.take_session(session, token=token, until=_lease_end(now), now=now)
    return session if is_ours else None


def _begun_afresh(session: ChatSession, *, token: str, now: dt.datetime) -> ChatSession | None:
    """Return the session with our lease and nothing in it, None if it is no longer as it was read."""
    was_counted = session.message_count > 0
    old = Amount(int(was_counted), session.message_count, session.size_bytes)
    fresh = _fresh(token=token, now=now) | {"message_count": 0, "tokens": 0, "size_bytes": 0}

    def reset() -> bool:
        # The lease first, which nobody else can hold then: what follows is in the same transaction.
        if not statements.take_session(session, token=token, until=_lease_end(now), now=now):
            return False
        ChatSession.objects.filter(pk=session.pk).update(**fresh)
        if was_counted:
            statements.delete_messages([session.pk])
            holdings.subtract([(session.key_fingerprint, old)])
        return True

    if not in_transaction(reset):
        return None
    for name, value in fresh.items():
        setattr(session, name, value)
    return session


def _fresh(*, token: str, now: dt.datetime) -> dict[str, object]:
    # Expired from the beginning: until its first turn is stored, only the lease keeps it.
    return {
        "incarnation": secrets.token_hex(16),
        "is_sealed": settings.SESSION_SEALED,
        "created_at": now,
        "last_message_at": now,
        "expires_at": now,
        "lock_token": token,
        "locked_until": _lease_end(now),
    }


def _lease_end(now: dt.datetime) -> dt.datetime:
    return now + dt.timedelta(seconds=settings.SESSION_LEASE_SECONDS)


def _history_or_nothing_begun(session: ChatSession, caller: Caller, token: str) -> Sequence[Said]:
    try:
        return _history(session, caller)
    except UnreadableError:
        abandon_turn(caller, session.session_id, token=token)
        raise


def _history(session: ChatSession, caller: Caller) -> Sequence[Said]:
    if not session.message_count:
        return []
    # One more than may go up: a turn of which only the end was read is then too long.
    first = max(0, session.message_count - settings.SESSION_CONTEXT_MESSAGES - 1)
    sealer = sealer_for(session, api_key=caller.api_key)
    return [
        Said(row.role, sealer.open(row.content, position=row.position, role=row.role), row.tokens)
        for row in statements.messages_from(session, first)
    ]
