"""Proxies whose operator has decided something of keys before they start, and requests to them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx2 as httpx

from billing import keys
from gateway.tests.fake_upstream import Exchange
from gateway.tests.live import PATIENCE_S, LiveProxy, instance, new_client

FEW, TOKENS, STREAMS = "sk-few-requests-00001", "sk-few-tokens-000001", "sk-streams-000000001"
MODELS = "sk-some-models-000001"
NETWORKS = "sk-some-networks-0001"
CENT, LONG, DRY = "sk-last-cent-00000001", "sk-long-stream-000001", "sk-dry-0000000000001"
FREE = "sk-without-limits-001"
RETRIED = "sk-retried-0000000001"
TALKS = "sk-talks-00000000001"
# What the operator has decided of them for `limited`.
DECIDED: dict[str, dict[str, Any]] = {
    FEW: {"requests_per_minute": 3},
    RETRIED: {"requests_per_minute": 60},
    TOKENS: {"tokens_per_minute": 1000},
    STREAMS: {"concurrent_streams": 2},
    MODELS: {"allowed_models": "gpt-4o-mini\no3*"},
    NETWORKS: {"allowed_networks": "192.0.2.0/24\n2001:db8::/32"},
    CENT: {"monthly_usd": "0.0100000"},
    LONG: {"monthly_usd": "0.0100000"},
    DRY: {"monthly_usd": "0.0001000"},
    TALKS: {"requests_per_minute": 1},
}
CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
# gpt-4o-mini costs 0.15 and 0.60 USD per million tokens.
USAGE = {"prompt_tokens": 100, "completion_tokens": 500, "total_tokens": 600}
COST = Decimal("0.000315")

_DECIDE = """
import json, sys
from django.conf import settings
from billing import keys, services
for api_key, fields in json.loads({decided!r}).items():
    raw = api_key.encode()
    fingerprint = keys.fingerprint(raw, pepper=settings.KEY_PEPPER.encode())
    key = services.ensure_key(fingerprint=fingerprint, hint=keys.hint(raw))
    for name, value in fields.items():
        setattr(key, name, value)
    key.full_clean()
    services.save_policy(key)
"""


def decide(proxy: LiveProxy, decided: dict[str, dict[str, Any]]) -> None:
    """Give keys limits of their own, as an operator would in the admin."""
    proxy.manage("shell", "-v0", "-c", _DECIDE.format(decided=json.dumps(decided)))


def wait_until_counting(proxy: LiveProxy) -> None:
    """Return once all workers are there and none counts its store as away: on a busy machine Redis may be late."""
    workers = float(proxy.environment.get("WORKERS", "1"))
    deadline = time.monotonic() + PATIENCE_S
    while True:
        lines = proxy.get("/metrics").text.splitlines()
        said = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        if float(said["proxysite_workers"]) >= workers and float(said["proxysite_limits_away"]) == 0:
            return
        assert time.monotonic() < deadline, proxy.log[-3000:]
        time.sleep(0.05)


@contextlib.contextmanager
def limited_proxy(decided: dict[str, dict[str, Any]], **environment: str) -> Iterator[LiveProxy]:
    """Serve with what is decided of some keys; with `REDIS_URL` "" in memory.

    What is exact is so while Redis answers: on a busy machine it is given the time that it may need.
    """
    settings = {"JOURNAL_FLUSH_SECONDS": "0.1", "LIMITS_TIMEOUT_SECONDS": "20"} | environment
    with instance(**settings) as proxy:
        if decided:
            decide(proxy, decided)
        proxy.start()
        wait_until_counting(proxy)
        yield proxy


def spent_by(proxy: LiveProxy, api_key: str) -> Decimal:
    """Return what the ledger says that a key has spent, in USD."""
    pepper = (proxy.var_dir / "key_pepper").read_text().strip().encode()
    fingerprint = keys.fingerprint(api_key.encode(), pepper=pepper)
    rows = proxy.rows(
        "SELECT COALESCE(SUM(r.cost_usd), 0) FROM billing_usagerecord r JOIN billing_apikey k ON k.id = r.key_id "
        f"WHERE k.fingerprint = '{fingerprint}'"
    )
    return Decimal(int(rows[0][0])) / 10**7


async def answer(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer(json.dumps({"model": "gpt-4o-mini", "choices": [], "usage": USAGE}).encode())


def ask(proxy: LiveProxy, api_key: str, **more: Any) -> httpx.Response:
    options: dict[str, Any] = {"json": CHAT | more.pop("json", {})} | more
    headers = {"authorization": f"Bearer {api_key}"} | options.pop("headers", {})
    return proxy.post(options.pop("path", "/v1/chat/completions"), headers=headers, **options)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"]


def metric(proxy: LiveProxy, line: str) -> float:
    for text in proxy.get("/metrics").text.splitlines():
        if text.startswith(line):
            return float(text.rpartition(" ")[2])
    return 0.0


def streamed(proxy: LiveProxy, api_key: str) -> tuple[bytes, bool]:
    """Return the end of a stream, and whether it was cut."""
    received = b""
    url, headers = f"{proxy.url}/v1/chat/completions", {"authorization": f"Bearer {api_key}"}
    with (
        new_client() as client,
        client.stream("POST", url, json=CHAT | {"stream": True}, headers=headers) as response,
    ):
        assert response.status_code == 200
        try:
            for chunk in response.iter_raw():
                received = received[-2000:] + chunk
        except httpx.RemoteProtocolError:
            return received, True
    return received, False
