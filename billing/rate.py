"""How often one address may ask for balances: a key cannot be guessed by trying."""

from __future__ import annotations

import ipaddress
import logging
import time

from django.conf import settings
from django.core.cache import cache
from redis import RedisError

logger = logging.getLogger(__name__)

_WINDOW_S = 60


def retry_after_s(address: str, *, now: float | None = None) -> int | None:
    """Count one request of this address; return None if it may go on, else the seconds until it may ask again.

    A cache that is away lets everybody in: the ledger must stay readable, and a key has more than 100 bits.
    """
    now = time.time() if now is None else now
    window, elapsed_s = divmod(int(now), _WINDOW_S)
    name = f"billing:rate:{_network(address)}:{window}"
    try:
        cache.add(name, 0, timeout=2 * _WINDOW_S)
        count = cache.incr(name)
    except ValueError:  # evicted between the two
        return None
    except (RedisError, OSError) as exc:
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
