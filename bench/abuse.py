"""The attacks of `gateway/tests/test_abuse.py` in full: `python -m bench.abuse [--connections N] [--keys N]`.

10,000 connections that say nothing, and a million keys that nobody has: refused by one upstream, accepted by another.
Prints what worker, ledger process and database grew by; an ordinary client asks on meanwhile. Exit status 1 when it
was not answered or when memory grew with the number of keys. On SQLite, or with DATABASE_URL on a server, in a
database of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time

from gateway.tests.attacks import MIB, Crowd, attacked, descriptors_of, garbage_keys, ledger_of, memory_of, worker_of
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}).encode()
ANSWER = b'{"model": "gpt-4o-mini", "usage": {"prompt_tokens": 9, "completion_tokens": 1}}'
TABLES = ("apikey", "usagerecord", "usageday", "keyday", "usagehour", "grant")
CLIENTS = 8
BATCH = 500  # requests that one client sends before it looks up
# Python's own arenas and a database's cache may grow a little; by key nothing may.
MOST_GROWTH_BYTES = 40 * MIB


async def refuse(exchange: Exchange) -> None:
    await _forget(exchange)
    await exchange.answer(b'{"error": {}}', status="401 Unauthorized")


async def accept(exchange: Exchange) -> None:
    await _forget(exchange)
    await exchange.answer(ANSWER)


async def _forget(exchange: Exchange) -> None:
    await exchange.read_body()
    exchange.request.body.clear()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.abuse", description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=1_000_000, help="of each kind")
    options = parser.parse_args()
    misses = half_open(options.connections)
    for name, script in (("refused", refuse), ("accepted", accept)):
        misses += keys(options.keys, name, script)
    for miss in misses:
        print(f"missed: {miss}")
    return 1 if misses else 0


def half_open(connections: int) -> list[str]:
    """Open connections that say nothing, and wait until the gateway has closed them."""
    with FakeUpstream(accept) as upstream, LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        pid = worker_of(proxy)
        before = descriptors_of(pid)
        with attacked(proxy) as cost, Crowd(proxy) as crowd:
            crowd.join(connections)
            held = descriptors_of(pid) - before
            crowd.wait_until_closed(60)
        left = descriptors_of(pid) - before
    each = cost.peak_bytes / max(held, 1)
    print(
        f"{connections:,} half-open connections: {held:,} held at once, {each / 1000:.1f} kB each; {cost}; {left} left"
    )
    return [f"{left} descriptors are left of half-open connections"] if left > 10 else []


def keys(count: int, name: str, script: object) -> list[str]:
    """Ask with so many keys, and look at what grew once the ledger has all of it."""
    with FakeUpstream(script) as upstream, LiveProxy(UPSTREAM_URL=upstream.url) as proxy:  # type: ignore[arg-type]
        warm_up = max(count // 10, 1)
        _ask(proxy, upstream, warm_up, first=0)
        _wait_for_records(proxy, warm_up)
        pids = {"worker": worker_of(proxy), "ledger process": ledger_of(proxy)}
        before = {part: memory_of(pid) for part, pid in pids.items()}
        began_s = time.monotonic()
        with attacked(proxy) as cost:
            _ask(proxy, upstream, count - warm_up, first=warm_up)
            _wait_for_records(proxy, count)
        took_s = time.monotonic() - began_s
        grown = {part: memory_of(pid) - before[part] for part, pid in pids.items()}
        rows = {table: proxy.rows(f"SELECT count(*) FROM billing_{table}")[0][0] for table in TABLES}
        size = _database_bytes(proxy)
    per_s = (count - warm_up) / took_s
    print(f"\n{count:,} keys that the upstream {name}: {per_s:,.0f} requests/s; {cost}")
    print("  memory before: " + ", ".join(f"{part} {bytes_ / MIB:.0f} MiB" for part, bytes_ in before.items()))
    print("  memory grew by " + ", ".join(f"{part} {bytes_ / MIB:.1f} MiB" for part, bytes_ in grown.items()))
    print("  rows: " + ", ".join(f"{table} {found:,}" for table, found in rows.items()))
    print(f"  database: {size / 1e6:,.0f} MB, {size / count:,.0f} bytes a key")
    misses = [f"{part} grew by {more / MIB:.1f} MiB" for part, more in grown.items() if more > MOST_GROWTH_BYTES]
    if name == "refused" and rows["apikey"] > 0:
        misses.append(f"{rows['apikey']} refused keys are known")
    return misses


def _ask(proxy: LiveProxy, upstream: FakeUpstream, count: int, *, first: int) -> None:
    """Ask with each key once, from several connections."""
    shares = [range(first + number, first + count, CLIENTS) for number in range(CLIENTS)]
    threads = [threading.Thread(target=_ask_each, args=(proxy, upstream, share)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ask_each(proxy: LiveProxy, upstream: FakeUpstream, numbers: range) -> None:
    for start in range(0, len(numbers), BATCH):
        with RawClient(proxy, timeout_s=60) as client:
            for number in numbers[start : start + BATCH]:
                (key,) = garbage_keys(1, first=number)
                fields = (f"Authorization: Bearer {key}", "Content-Type: application/json")
                client.request("POST", "/v1/chat/completions", *fields, body=BODY)
                client.answer()
        upstream.requests.clear()


def _wait_for_records(proxy: LiveProxy, count: int) -> None:
    deadline_s = time.monotonic() + 60 + count / 500
    statement = "SELECT count(*) FROM billing_usagerecord WHERE endpoint = '/v1/chat/completions'"
    while proxy.rows(statement)[0][0] < count:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the ledger has {proxy.rows(statement)[0][0]:,} of {count:,} requests")
        time.sleep(0.5)


def _database_bytes(proxy: LiveProxy) -> int:
    if proxy.environment.get("DATABASE_URL", "").startswith("postgres"):
        return int(proxy.rows("SELECT pg_database_size(current_database())")[0][0])
    return sum(path.stat().st_size for path in proxy.var_dir.glob("db.sqlite3*"))


if __name__ == "__main__":
    sys.exit(main())
