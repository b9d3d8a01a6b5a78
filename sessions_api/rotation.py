"""What is stored, encrypted anew with the first of SESSION_KEYS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sessions_api.models import ChatMessage
from sessions_api.sealing import UnreadableError, sealer_for
from sessions_api.transactions import in_transaction

_CHUNK_MESSAGES = 500


@dataclass(slots=True)
class Rotation:
    """How many messages were looked at, encrypted anew, and left because no key opens them."""

    examined: int = 0
    changed: int = 0
    unreadable: int = 0


def rotate_session_keys(
    *, chunk_messages: int = _CHUNK_MESSAGES, progress: Callable[[int], None] | None = None
) -> Rotation:
    """Encrypt what an older secret encrypted with the first one, in chunks; a second run changes nothing.

    Sealed sessions have nothing of the operator's secrets in them, and stay as they are.
    """
    done = Rotation()
    after = 0
    while True:
        chunk = _chunk_after(after, chunk_messages)
        if not chunk:
            return done
        after = chunk[-1].pk
        changed = [fresh for message in chunk if (fresh := _encrypted_anew(message, done)) is not None]
        in_transaction(lambda changed=changed: _write(changed))  # type: ignore[misc]
        done.examined += len(chunk)
        done.changed += len(changed)
        if progress is not None:
            progress(len(chunk))


def _chunk_after(pk: int, most: int) -> list[ChatMessage]:
    rows = ChatMessage.objects.filter(pk__gt=pk, session__is_sealed=False).select_related("session")
    return list(rows.order_by("pk")[:most])


def _encrypted_anew(message: ChatMessage, done: Rotation) -> ChatMessage | None:
    sealer = sealer_for(message.session)
    if sealer.is_current(message.content):
        return None
    try:
        text = sealer.open(message.content, position=message.position, role=message.role)
    except UnreadableError:
        done.unreadable += 1
        return None
    message.content = sealer.seal(text, position=message.position, role=message.role)
    return message


def _write(messages: list[ChatMessage]) -> None:
    # A message is written once and never changed: one that is gone meanwhile is not brought back by an UPDATE.
    for message in messages:
        ChatMessage.objects.filter(pk=message.pk).update(content=message.content)
