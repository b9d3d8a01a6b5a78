"""How often one address may ask for balances: a key cannot be guessed by trying."""

from __future__ import annotations

import ipaddress
import logging
import time

from django.conf import settings
from django.core.cache import caches
from redis import RedisError

logger = logging.getLogger(__name__)

_WINDOW_S = 60
# Whoever has found the cache away has found so for the whole process, for so long.
_AWAY_S = 5.0


class Breaker:
    """Open while nobody is to ask the cache."""

    def __init__(self) -> None:
        self._until_s = 0.0

    def open(self) -> None:
        self._until_s = time.monotonic() + _AWAY_S

    @property
    def is_open(self) -> bool:
        return time.monotonic() < self._until_s


_breaker = Breaker()


def retry_after_s(address: str, *, now: float | None = None) -> int | None:
    """Count one request of this address; return None if it may go on, else the seconds until it may ask again.

    A cache that is away lets everybody in, and nobody waits for it: the ledger must stay readable, and a key has more
    than 100 bits.
    """
    if _breaker.is_open:
        return None
    now = time.time() if now is None else now
    window, elapsed_s = divmod(int(now), _WINDOW_S)
    name = f"billing:rate:{_network(address)}:{window}"
    try:
        caches["rates"].add(name, 0, timeout=2 * _WINDOW_S)
        count = caches["rates"].incr(name)
    except ValueError:  # evicted between the two
        return None
    except (RedisError, OSError) as exc:
        _breaker.open()
        logger.warning("requests for balances are not limited: the cache is away (%s)", type(exc).__name__)
        return None
    return None if count <= settings.BALANCE_RATE_PER_MINUTE else _WINDOW_S - elapsed_s


def _network(address: str) -> str:
    """Return what one subscriber has: an IPv4 address, or the 64 bits of an IPv6 one that he cannot change."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)).network_address)
    return str(parsed)
