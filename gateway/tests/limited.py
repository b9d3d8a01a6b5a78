"""Proxies whose operator has decided something of keys before they start."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from billing import keys
from gateway.tests.live import PATIENCE_S, LiveProxy

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
    proxy = LiveProxy(**settings)
    try:
        proxy.set_up()
        decide(proxy, decided)
        proxy.start()
        wait_until_counting(proxy)
        yield proxy
    finally:
        proxy.__exit__()


def spent_by(proxy: LiveProxy, api_key: str) -> Decimal:
    """Return what the ledger says that a key has spent, in USD."""
    pepper = (proxy.var_dir / "key_pepper").read_text().strip().encode()
    fingerprint = keys.fingerprint(api_key.encode(), pepper=pepper)
    rows = proxy.rows(
        "SELECT COALESCE(SUM(r.cost_usd), 0) FROM billing_usagerecord r JOIN billing_apikey k ON k.id = r.key_id "
        f"WHERE k.fingerprint = '{fingerprint}'"
    )
    return Decimal(int(rows[0][0])) / 10**7
