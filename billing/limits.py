"""What operators allow each key, as it stands in its row: read into values, and checked when it is entered."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_network

from django.core.exceptions import ValidationError
from django.utils.translation import gettext_lazy as _

Network = IPv4Network | IPv6Network

_MODEL_MAX_CHARS = 100


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may do; None where the settings decide, 0 where nothing is limited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_streams: int | None = None
    monthly_usd: Decimal | None = None
    models: tuple[str, ...] | None = None
    networks: tuple[Network, ...] | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class KeyPolicy:
    """What is decided of one key, and when it last was. Keys that may do the same share their `limits`."""

    fingerprint: str
    changed_at: dt.datetime
    is_registered: bool
    price_factor: Decimal
    limits: KeyLimits


def read_models(text: str) -> tuple[str, ...] | None:
    """Return the names in a text, None for an empty one; `*` alone is every model, so no limit: ()."""
    names = tuple(text.replace(",", " ").split())
    if "*" in names:
        return ()
    return names or None


def read_networks(text: str) -> tuple[Network, ...] | None:
    """Return the networks in a text, None for an empty one. Raises ValueError."""
    return tuple(ip_network(word) for word in text.replace(",", " ").split()) or None


def check_models(text: str) -> None:
    for name in text.replace(",", " ").split():
        if len(name) > _MODEL_MAX_CHARS or not name.isprintable() or "*" in name[:-1]:
            raise ValidationError(
                _("%(name)s is no name of a model; only its last character may be *."), params={"name": name[:100]}
            )


def check_networks(text: str) -> None:
    try:
        read_networks(text)
    except ValueError as exc:
        raise ValidationError(_("Not a network: %(why)s"), params={"why": str(exc)[:200]}) from exc
