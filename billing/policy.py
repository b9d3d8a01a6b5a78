"""How gateways learn what operators have decided of keys: a message by Redis, and a version for those who poll."""

from __future__ import annotations

import logging
import secrets
from functools import partial

import redis
from django.conf import settings
from django.core.cache import cache
from django.db import transaction

logger = logging.getLogger(__name__)

CHANNEL = "proxysite:policy"
VERSION_KEY = "billing:policy-version"


def announce_change() -> None:
    """Tell the gateways to read blocked keys and limits again, once the current transaction is in."""
    transaction.on_commit(partial(_announce, secrets.token_hex(8)), robust=True)


def version() -> str:
    """Return what changes with every announcement; "" before the first, or where this process cannot see them."""
    found: str = cache.get(VERSION_KEY, "")
    return found


def _announce(new_version: str) -> None:
    """A Redis that is away delays the news until the next poll, and nothing else."""
    try:
        cache.set(VERSION_KEY, new_version, timeout=None)
        if settings.REDIS_URL:
            with redis.Redis.from_url(settings.REDIS_URL, socket_timeout=2, socket_connect_timeout=2) as client:
                client.publish(CHANNEL, new_version)
    except (redis.RedisError, OSError) as exc:
        logger.warning("the change of a key's policy was not announced (%s)", type(exc).__name__)
