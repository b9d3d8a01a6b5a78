"""The balance that the upstream itself reports for a key: for upstreams that are proxies with ledgers of their own."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import json
import ssl
from decimal import Decimal
from typing import Any, NoReturn

import httpx2 as httpx
from django.conf import settings

from billing.selectors import Balance, window_start

_ANSWER_MAX_BYTES = 1024 * 1024
_READ_TIMEOUT_S = 20.0
# For both answers, whole: each byte may take as long as a read.
_LONGEST_S = 30.0


class UpstreamBalanceError(Exception):
    """The upstream gave no balance. `status` is its answer's, 0 where there was no usable one."""

    def __init__(self, reason: str, *, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


async def fetch_balance(api_key: str, now: dt.datetime, *, timeout_s: float = _LONGEST_S) -> Balance:
    """Return `hard_limit_usd` and the use of the last USAGE_WINDOW_DAYS. Raises UpstreamBalanceError."""
    tomorrow = now.astimezone(dt.UTC).date() + dt.timedelta(days=1)
    dates = {"start_date": window_start(now).isoformat(), "end_date": tomorrow.isoformat()}
    if not api_key.isascii() or not api_key.isprintable():
        raise UpstreamBalanceError("no key can look like this", status=401)
    try:
        async with asyncio.timeout(timeout_s), _client(api_key) as client:
            subscription, usage = await asyncio.gather(
                _read(client, "subscription", "hard_limit_usd", {}), _read(client, "usage", "total_usage", dates)
            )
    except TimeoutError:
        raise UpstreamBalanceError(f"no whole answer within {timeout_s:g} s") from None
    return Balance(total=subscription, used=usage / 100)


def _client(api_key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{settings.UPSTREAM_URL}/v1/dashboard/billing/",
        headers={"Authorization": f"Bearer {api_key}", "Accept": "application/json"},
        verify=_ssl_context(settings.UPSTREAM_CA_FILE),
        proxy=settings.UPSTREAM_PROXY or None,
        timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=settings.CONNECT_TIMEOUT_SECONDS),
        trust_env=False,
    )


@functools.cache
def _ssl_context(extra_ca_file: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if extra_ca_file:
        context.load_verify_locations(cafile=extra_ca_file)
    return context


async def _read(client: httpx.AsyncClient, route: str, name: str, query: dict[str, str]) -> Decimal:
    """Return one number of one route's answer."""
    try:
        async with client.stream("GET", route, params=query) as response:
            if response.status_code != 200:
                raise UpstreamBalanceError(f"HTTP {response.status_code}", status=response.status_code)
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _ANSWER_MAX_BYTES:
                    raise UpstreamBalanceError("the answer is too large")
    except httpx.HTTPError as exc:
        raise UpstreamBalanceError(type(exc).__name__) from exc
    return _number(body, name)


def _number(body: bytes, name: str) -> Decimal:
    try:
        answer: Any = json.loads(body, parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse)
        value = answer[name]
    except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as exc:
        raise UpstreamBalanceError("the answer is no balance") from exc
    # Not abs(): it overflows where an exponent has seven digits.
    if not isinstance(value, Decimal) or value.copy_abs() > 10**15:
        raise UpstreamBalanceError("the answer is no balance")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
