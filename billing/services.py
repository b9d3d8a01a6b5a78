"""Every change of the ledger that somebody asks for; what the gateway reports comes in by `record_events`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from decimal import Decimal
from uuid import UUID

from django.contrib.auth.models import User
from django.db import IntegrityError, transaction
from django.utils import timezone

from billing import policy
from billing.models import ApiKey, Grant, GrantToken
from billing.price_refresh import RefreshError, refresh_prices
from billing.recording import RecordResult, record_events
from billing.repricing import reprice
from billing.retention import purge_usage
from billing.rollups import rebuild_usage_days

__all__ = [
    "AlreadyDoneError",
    "RecordResult",
    "RefreshError",
    "block_key",
    "block_keys",
    "ensure_key",
    "give_grant",
    "give_grants",
    "purge_usage",
    "rebuild_usage_days",
    "record_events",
    "refresh_prices",
    "register_key",
    "register_keys",
    "reprice",
    "revoke_grant",
    "save_policy",
    "unblock_key",
    "unblock_keys",
    "unregister_key",
    "unregister_keys",
    "use_token",
]


class AlreadyDoneError(Exception):
    """Somebody else was faster: the key is known, or the form has been used, by now. Nothing was changed."""


def ensure_key(*, fingerprint: str, hint: str) -> ApiKey:
    """Return the key of that fingerprint, made if it is new: an operator may know a key before its first use.

    A key that an operator has entered is registered.
    """
    key, _ = ApiKey.objects.get_or_create(fingerprint=fingerprint, defaults={"hint": hint})
    register_key(key)
    return key


def register_key(key: ApiKey) -> bool:
    """Let the key pass where only registered ones do; return whether it was none."""
    return bool(register_keys([key]))


def unregister_key(key: ApiKey) -> bool:
    return bool(unregister_keys([key]))


def register_keys(keys: Iterable[ApiKey]) -> list[ApiKey]:
    """Let the keys pass where only registered ones do; return those that were none."""
    return _changed(keys, lambda key: _set_registered(key, True))


def unregister_keys(keys: Iterable[ApiKey]) -> list[ApiKey]:
    return _changed(keys, lambda key: _set_registered(key, False))


def _set_registered(key: ApiKey, is_registered: bool) -> bool:
    others = ApiKey.objects.filter(pk=key.pk, registered=not is_registered)
    has_changed = bool(others.update(registered=is_registered, policy_changed_at=timezone.now()))
    if has_changed:
        key.registered = is_registered
    return has_changed


def _changed(keys: Iterable[ApiKey], change: Callable[[ApiKey], bool]) -> list[ApiKey]:
    """Return the keys that `change` has changed, each by itself, and announce all of that at once.

    A Redis that says nothing is waited for with each announcement, and the last of many keys would be long in coming.
    """
    changed: list[ApiKey] = []
    try:
        for key in keys:
            if change(key):
                changed.append(key)
    finally:
        if changed:
            policy.announce_change()
    return changed


def save_policy(key: ApiKey) -> None:
    """Save a key with what was decided of it, and have every gateway learn that.

    Of a key that is there already nothing else: it may have been blocked or used since it was read. Raises
    AlreadyDoneError if it is a new one that a gateway has just made known.
    """
    decided = None
    if not key._state.adding:
        decided = [field.name for field in key._meta.concrete_fields if field.editable and not field.primary_key]
        decided.append("policy_changed_at")
    key.policy_changed_at = timezone.now()
    try:
        with transaction.atomic():
            key.save(force_insert=decided is None, update_fields=decided)
            policy.announce_change()
    except IntegrityError as exc:
        if decided is None and ApiKey.objects.filter(fingerprint=key.fingerprint).exists():
            raise AlreadyDoneError from exc
        raise


def give_grant(
    key: ApiKey,
    amount_usd: Decimal,
    *,
    reason: str = "",
    valid_from: dt.datetime | None = None,
    valid_until: dt.datetime | None = None,
    given_by: User | None = None,
) -> Grant:
    """Give a key an amount to use, from now on if no time is said. Raises ValidationError."""
    grant = Grant(
        key=key,
        amount_usd=amount_usd,
        reason=reason,
        valid_from=valid_from or timezone.now(),
        valid_until=valid_until,
        given_by=given_by,
    )
    grant.full_clean()
    grant.save(force_insert=True)
    return grant


def give_grants(
    keys: Iterable[ApiKey],
    amount_usd: Decimal,
    *,
    token: UUID,
    reason: str = "",
    valid_until: dt.datetime | None = None,
    given_by: User | None = None,
) -> list[Grant]:
    """Give each of these keys the same, all of them or none.

    Raises ValidationError; AlreadyDoneError if the token has been used.
    """
    now = timezone.now()
    grants = [
        Grant(
            key=key,
            amount_usd=amount_usd,
            reason=reason,
            valid_from=now,
            valid_until=valid_until,
            given_by=given_by,
        )
        for key in keys
    ]
    for first in grants[:1]:  # the others differ from it in a key that is there
        first.full_clean()
    with transaction.atomic():
        use_token(token)
        return Grant.objects.bulk_create(grants, batch_size=1000)


def use_token(token: UUID) -> None:
    """Use up the token of a form, in the transaction of what it does. Raises AlreadyDoneError if that has been done.

    Whoever comes while another one does it waits for how that ends.
    """
    _, is_new = GrantToken.objects.get_or_create(token=token)
    if not is_new:
        raise AlreadyDoneError


def revoke_grant(grant: Grant, *, now: dt.datetime | None = None) -> bool:
    """Make a grant count no more; return whether it did until now."""
    return bool(Grant.objects.filter(pk=grant.pk, revoked_at=None).update(revoked_at=now or timezone.now()))


def block_key(key: ApiKey, *, now: dt.datetime | None = None) -> bool:
    """Have every gateway refuse the key, within 30 s or at once with Redis; return whether it was not blocked yet."""
    return bool(block_keys([key], now=now))


def unblock_key(key: ApiKey) -> bool:
    return bool(unblock_keys([key]))


def block_keys(keys: Iterable[ApiKey], *, now: dt.datetime | None = None) -> list[ApiKey]:
    """Have every gateway refuse the keys, as `block_key` does; return those that were not blocked yet."""
    blocked_at = now or timezone.now()
    return _changed(keys, lambda key: _set_blocked(key, blocked_at))


def unblock_keys(keys: Iterable[ApiKey]) -> list[ApiKey]:
    return _changed(keys, lambda key: _set_blocked(key, None))


def _set_blocked(key: ApiKey, blocked_at: dt.datetime | None) -> bool:
    is_blocked = blocked_at is not None
    others = ApiKey.objects.filter(pk=key.pk, blocked=not is_blocked)
    return bool(others.update(blocked=is_blocked, blocked_at=blocked_at))
