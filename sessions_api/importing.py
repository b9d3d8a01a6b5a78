"""A conversation that was held elsewhere takes the place of a session: all of it, or nothing changes."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Sequence

from django.conf import settings
from django.db import IntegrityError, transaction

from proxysite.envelope import ProError
from sessions_api import holdings
from sessions_api.context import Said
from sessions_api.holdings import Amount
from sessions_api.models import ChatMessage, ChatSession
from sessions_api.purging import purge_some
from sessions_api.sealing import sealer_for
from sessions_api.transactions import in_transaction
from sessions_api.turns import Caller, SessionBusyError


def import_session(
    caller: Caller, session_id: str, said: Sequence[Said], *, model: str, now: dt.datetime
) -> ChatSession:
    """Put what was said in the place of the caller's session of that name, a new one if there is none.

    At least one message and at most SESSION_MAX_MESSAGES. Raises SessionBusyError while a turn is under way; ProError
    where a cap is reached.
    """
    session = ChatSession(
        key_fingerprint=caller.fingerprint,
        key_hint=caller.hint,
        session_id=session_id,
        incarnation=secrets.token_hex(16),
        is_sealed=settings.SESSION_SEALED,
        model=model,
        message_count=len(said),
        tokens=sum(each.tokens for each in said),
        created_at=now,
        last_message_at=now,
        expires_at=now + dt.timedelta(seconds=settings.SESSION_TTL_SECONDS),
    )
    sealer = sealer_for(session, api_key=caller.api_key)
    sealed = [sealer.seal(each.content, position=position, role=each.role) for position, each in enumerate(said)]
    session.size_bytes = sum(map(len, sealed))

    def replace() -> None:
        _take_the_place(session, now)
        ChatMessage.objects.bulk_create(
            ChatMessage(
                session=session, position=position, role=each.role, content=content, tokens=each.tokens, created_at=now
            )
            for position, (each, content) in enumerate(zip(said, sealed, strict=True))
        )
        holdings.add(caller.fingerprint, Amount(1, session.message_count, session.size_bytes))

    try:
        in_transaction(replace)
    except ProError as full:
        # What has expired takes no room, whether or not a purge has run.
        if not purge_some(caller.fingerprint if full.status == 429 else None, now=now):
            raise
        in_transaction(replace)
    return session


def _take_the_place(session: ChatSession, now: dt.datetime) -> None:
    """Write the session's row where its name is, and remove what was there, within the caller's transaction."""
    same_name = ChatSession.objects.filter(key_fingerprint=session.key_fingerprint, session_id=session.session_id)
    found = same_name.select_for_update().first()
    if found is None:
        session.pk = None
        try:
            with transaction.atomic():
                session.save(force_insert=True)
        except IntegrityError:  # somebody else was quicker
            raise SessionBusyError from None
        return
    if found.lock_token and found.locked_until is not None and found.locked_until > now:
        raise SessionBusyError
    session.pk = found.pk
    session.save(force_update=True)
    if found.message_count:
        ChatMessage.objects.filter(session=found).delete()
        holdings.subtract([(found.key_fingerprint, Amount(1, found.message_count, found.size_bytes))])
