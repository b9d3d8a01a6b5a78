"""How much is held, by each key and in all, kept up with each change: caps cost the same however much there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from django.conf import settings

from proxysite.envelope import Message, ProError
from sessions_api import statements, wording
from sessions_api.models import ChatHolding

_RETRY_AFTER_S = 60


@dataclass(frozen=True, slots=True)
class Amount:
    """So much more, or so much less, of what is held."""

    sessions: int = 0
    messages: int = 0
    size_bytes: int = 0


def _caps(key_fingerprint: str) -> Amount:
    if key_fingerprint == ChatHolding.ALL_KEYS:
        return Amount(
            settings.SESSION_ALL_MAX_SESSIONS, settings.SESSION_ALL_MAX_MESSAGES, settings.SESSION_ALL_MAX_BYTES
        )
    return Amount(settings.SESSION_KEY_MAX_SESSIONS, settings.SESSION_KEY_MAX_MESSAGES, settings.SESSION_KEY_MAX_BYTES)


_NAMES = {
    "sessions": Message("会话数", "sessions"),
    "messages": Message("消息数", "messages"),
    "size_bytes": Message("会话字节数", "bytes of messages"),
}


def check_room(key_fingerprint: str, more: Amount) -> None:
    """Raise ProError where so much more would be too much: 429 for the key's own caps, 503 for those of all keys."""
    for holding in statements.holdings_of(key_fingerprint):
        caps = _caps(holding.key_fingerprint)
        for name in _NAMES:
            if getattr(holding, name) + getattr(more, name) > getattr(caps, name) and getattr(more, name):
                raise _full(holding.key_fingerprint, name)


def add(key_fingerprint: str, more: Amount) -> None:
    """Count so much more, within the caller's transaction. Raises ProError as `check_room` does; nothing then stays.

    The key's row first, then that of all keys, which is locked until the transaction ends: every writer keeps to that.
    """
    for name in (key_fingerprint, ChatHolding.ALL_KEYS):
        caps = _caps(name)
        for field in _NAMES:
            if getattr(more, field) > getattr(caps, field):
                raise _full(name, field)
        if not statements.add_within(_held(name, more), _held(name, caps)):
            check_room(key_fingerprint, more)
            raise _full(name, "size_bytes")


def subtract(removed: Iterable[tuple[str, Amount]]) -> None:
    """Count what was removed, by key, within the caller's transaction."""
    sums: dict[str, Counter[str]] = {}
    for key_fingerprint, amount in removed:
        for name in (key_fingerprint, ChatHolding.ALL_KEYS):
            sums.setdefault(name, Counter()).update({field: getattr(amount, field) for field in _NAMES})
    total = sums.pop(ChatHolding.ALL_KEYS, Counter())
    # Sorted, so that two who remove wait for each other and not both for ever; ALL_KEYS last, as in `add`.
    names = sorted(sums)
    statements.change_holdings([_less(name, sums[name]) for name in names])
    statements.delete_empty_holdings(names)
    statements.change_holdings([_less(ChatHolding.ALL_KEYS, total)])


def _held(key_fingerprint: str, amount: Amount) -> statements.Held:
    return statements.Held(key_fingerprint, amount.sessions, amount.messages, amount.size_bytes)


def _less(key_fingerprint: str, counts: Counter[str]) -> statements.Held:
    return statements.Held(key_fingerprint, *(-counts[field] for field in _NAMES))


def _full(key_fingerprint: str, name: str) -> ProError:
    if key_fingerprint == ChatHolding.ALL_KEYS:
        return ProError(503, wording.all_full(_NAMES[name]), retry_after_s=_RETRY_AFTER_S)
    return ProError(429, wording.key_full(_NAMES[name], getattr(_caps(key_fingerprint), name)))
