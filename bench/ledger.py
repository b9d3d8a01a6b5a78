"""How fast the ledger is when it is full: `python -m bench.ledger [--records N] [--days D]`.

On SQLite in a directory of its own, or, with DATABASE_URL, in that database, which must be empty. Seeds N records over
D days, then measures recording, a key's balance and the admin's first pages. Bars: README, "Measured speed".
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

BATCH_EVENTS = 500
EVENTS = 30_000
KEYS = 100
ROUNDS = 30
PAGE_BAR_MS = 100.0
EVENTS_BAR_PER_S = 2000.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--days", type=int, default=90, metavar="D")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-ledger-") as var_dir:
        os.environ |= {"VAR_DIR": var_dir, "DJANGO_SETTINGS_MODULE": "proxysite.settings", "PUBLIC_URL": ""}
        os.environ["BALANCE_RATE_PER_MINUTE"] = "1000000"
        return _measure(options.records, days=options.days, check=options.check)


def _measure(records: int, *, days: int, check: bool) -> int:
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", interactive=False, verbosity=0)
    began_s = time.monotonic()
    call_command("seed_usage", records, keys=KEYS, days=days, stdout=sys.stderr)
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
    size = _database_bytes() / 1e6
    print(f"{connection.vendor}, {records:,} records, {size:,.0f} MB, seeded in {time.monotonic() - began_s:.0f} s\n")
    print(f"| table | rows | bytes, indexes included |\n|---|---:|---:|\n{_tables()}\n")
    pages = {name: _p50_p99_ms(ask) for name, ask in _pages().items()}
    events_per_s = _recorded_per_s()
    print("| | p50, ms | p99, ms | bar |\n|---|---:|---:|---|")
    for name, (p50, p99) in pages.items():
        print(f"| {name} | {p50:.1f} | {p99:.1f} | ≤ {PAGE_BAR_MS:.0f} ms {'✓' if p50 <= PAGE_BAR_MS else '✗'} |")
    is_fast = events_per_s >= EVENTS_BAR_PER_S
    print(f"\nrecorded: {events_per_s:,.0f} events/s (bar {EVENTS_BAR_PER_S:,.0f} {'✓' if is_fast else '✗'})")
    missed = not is_fast or any(p50 > PAGE_BAR_MS for p50, _ in pages.values())
    return 1 if check and missed else 0


def _tables() -> str:
    from django.db import connection

    from billing import models

    lines = []
    for model in (models.UsageRecord, models.UsageDay, models.KeyDay, models.UsageHour, models.ApiKey, models.Grant):
        name = model._meta.db_table
        size = ""
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_total_relation_size(%s::regclass)", [name])
                size = f"{cursor.fetchone()[0]:,}"
        lines.append(f"| {name} | {model._default_manager.count():,} | {size} |")
    return "\n".join(lines)


def _pages() -> dict[str, Callable[[], Any]]:
    from django.conf import settings
    from django.contrib import admin
    from django.contrib.auth import get_user_model
    from django.test import Client
    from django.urls import reverse

    from billing import keys, services
    from billing.models import ApiKey, KeyDay

    api_key = "sk-bench-ledger-0123456789"
    fingerprint = keys.fingerprint(api_key.encode(), pepper=settings.KEY_PEPPER.encode())
    # The balance asked for is that of the busiest key: its usage is given to a key that can be asked with.
    busiest = KeyDay.objects.order_by("-requests").values_list("key_id", flat=True).first()
    ApiKey.objects.filter(pk=busiest).update(fingerprint=fingerprint)
    services.give_grant(ApiKey.objects.get(pk=busiest), 10_000, reason="bench")  # type: ignore[arg-type]
    operator = get_user_model().objects.create_superuser("bench", password="bench")
    client = Client()
    client.force_login(operator)
    developer = Client(headers={"authorization": f"Bearer {api_key}"})
    found: dict[str, Callable[[], Any]] = {
        "/pro/balance": lambda: _ok(developer, "/pro/balance"),
        "/pro/usage": lambda: _ok(developer, "/pro/usage"),
        "/admin/": lambda: _ok(client, "/admin/"),
    }
    admin.autodiscover()
    for model in sorted(admin.site._registry, key=lambda model: model._meta.label):
        if model._meta.app_label == "billing":
            url = reverse(f"admin:{model._meta.label_lower.replace('.', '_')}_changelist")
            found[url] = lambda url=url: _ok(client, url)  # type: ignore[misc]
    return found


def _ok(client: Any, url: str) -> None:
    answer = client.get(url)
    if answer.status_code != 200:
        raise SystemExit(f"{url}: {answer.status_code}")


def _p50_p99_ms(ask: Callable[[], Any]) -> tuple[float, float]:
    ask()  # templates and the database's cache
    found = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        ask()
        found.append((time.perf_counter() - began_s) * 1000)
    found.sort()
    return found[len(found) // 2], found[-1]


def _recorded_per_s() -> float:
    from billing.events import Usage, UsageEvent
    from billing.services import record_events

    now = dt.datetime.now(dt.UTC).timestamp()
    events = [
        UsageEvent(
            id=f"bench{number:010d}",
            started_at=now + number / 1e6,
            key_fingerprint=f"{number % KEYS:064x}",
            key_hint="sk-…0000",
            method="POST",
            endpoint="/v1/chat/completions",
            model="gpt-4o-mini",
            status=200,
            usage_source="upstream",
            usage=Usage(input_tokens=100 + number % 50, cached_input_tokens=number % 7, output_tokens=20),
            duration_ms=900,
        )
        for number in range(EVENTS)
    ]
    began_s = time.perf_counter()
    for start in range(0, EVENTS, BATCH_EVENTS):
        result = record_events(events[start : start + BATCH_EVENTS])
        if result.recorded != BATCH_EVENTS:
            raise SystemExit(f"only {result.recorded} of {BATCH_EVENTS} events were recorded")
    return EVENTS / (time.perf_counter() - began_s)


def _database_bytes() -> float:
    from django.db import connection

    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SELECT pg_database_size(current_database())")
        else:
            cursor.execute("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
        return float(cursor.fetchone()[0])


if __name__ == "__main__":
    sys.exit(main())
