"""Does the upstream answer? Asked when an operator looks, now and then, by a request that costs nothing."""

from __future__ import annotations

import contextlib
import ssl
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx2 as httpx
from django.conf import settings
from django.core.cache import cache
from redis.exceptions import RedisError

from gateway.transport import tls_context

_FRESH_SECONDS = 15
_PATIENCE_SECONDS = 5.0
_CACHE_KEY = "upstream-probe"


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether there was an answer below 500, after how long, and else what went wrong."""

    is_reachable: bool
    answer_ms: float
    trouble: str = ""


def probe() -> Probe:
    """Ask for the list of models without a key: an answer that is refused is an answer."""
    known: dict[str, Any] | None = None
    # Without the cache it is asked each time; that the cache is away is told elsewhere on the page.
    with contextlib.suppress(RedisError, OSError):
        known = cache.get(_CACHE_KEY)
    if known is not None:
        return Probe(**known)
    found = _ask()
    with contextlib.suppress(RedisError, OSError):
        cache.set(_CACHE_KEY, asdict(found), _FRESH_SECONDS)
    return found


def _ask() -> Probe:
    started = time.perf_counter()
    try:
        with (
            httpx.Client(
                verify=_context(), proxy=settings.UPSTREAM_PROXY or None, trust_env=False, timeout=_PATIENCE_SECONDS
            ) as client,
            # Its head is all that is asked for: a body may come a byte at a time, and never end.
            client.stream("GET", f"{settings.UPSTREAM_URL}/v1/models") as response,
        ):
            status = response.status_code
    except httpx.HTTPError as exc:
        return Probe(False, 0.0, type(exc).__name__)
    answer_ms = (time.perf_counter() - started) * 1000
    return Probe(status < 500, answer_ms, "" if status < 500 else f"HTTP {status}")


def _context() -> ssl.SSLContext:
    return tls_context(extra_ca_file=settings.UPSTREAM_CA_FILE or None)
