"""The attacks of `gateway/tests/test_abuse.py` in full: `python -m bench.abuse [--only NAME]`.

- half-open: 10,000 connections that say nothing
- hostile: 10,000 heads that hardly come, heads of 1 MB, bodies made to be hard to read, packed answers of 1 GiB, events
  without end, floods of WebSocket frames (`bench/hostile.py`)
- refused, accepted: a million keys that nobody has, at an upstream that refuses them, and at one that asks nobody

Prints what worker, ledger process and database grew by; an ordinary client asks on meanwhile. Exit status 1 when it
was not answered, or when memory grew beyond its bounds or with the number of keys. On SQLite, or with DATABASE_URL on a
server, in a database of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import threading
import time
from typing import cast

import uvloop

from bench import hostile
from gateway.tests.attacks import MIB, Crowd, attacked, descriptors_of, garbage_keys, ledger_of, memory_of, worker_of
from gateway.tests.live import LiveProxy

BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}).encode()
END = b'"end":"of the answer"}'
ANSWERS = {
    "refused": ("401 Unauthorized", b'{"error":{},' + END),
    "accepted": ("200 OK", b'{"model":"gpt-4o-mini","usage":{"prompt_tokens":9,"completion_tokens":1},' + END),
}
TABLES = ("apikey", "usagerecord", "usageday", "keyday", "usagehour", "grant")
CLIENTS = 4
PIPELINED = 8  # requests that one client sends before it waits for their answers
# Python's own arenas and a database's cache may grow a little; by key nothing may.
MOST_GROWTH_BYTES = 40 * MIB


class Upstream:
    """Gives every request the same answer, so cheaply that the gateway has the machine; on a thread of its own."""

    def __init__(self, status: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._answer = head.encode() + body
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstream", daemon=True)
        self.url = ""

    def __enter__(self) -> Upstream:
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _listen(self) -> str:
        server = await self._loop.create_server(lambda: _Answering(self._answer), "127.0.0.1", 0)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class _Answering(asyncio.Protocol):
    """One connection; what is posted to it is `BODY`."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while (head_end := self._rest.find(b"\r\n\r\n")) >= 0:
            end = head_end + 4 + (len(BODY) if self._rest.startswith(b"POST") else 0)
            if len(self._rest) < end:
                return
            self._rest = self._rest[end:]
            self._transport.write(self._answer)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.abuse", description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=1_000_000, help="of each kind")
    parser.add_argument("--only", choices=["half-open", "hostile", *ANSWERS], help="this attack alone")
    options = parser.parse_args()
    misses = []
    if options.only in (None, "half-open"):
        misses += half_open(options.connections)
    if options.only in (None, "hostile"):
        misses += hostile.all_attacks(options.connections)
    for name in ANSWERS:
        if options.only in (None, name):
            misses += keys(options.keys, name)
    for miss in misses:
        print(f"missed: {miss}")
    return 1 if misses else 0


def half_open(connections: int) -> list[str]:
    """Open connections that say nothing, and wait until the gateway has closed them."""
    with (
        Upstream(*ANSWERS["accepted"]) as upstream,
        # Longer than by default, so that none ends before the last is open.
        LiveProxy(UPSTREAM_URL=upstream.url, HEADER_TIMEOUT_SECONDS="60") as proxy,
    ):
        pid = worker_of(proxy)
        before = descriptors_of(pid)
        with attacked(proxy) as cost, Crowd(proxy) as crowd:
            crowd.join(connections)
            held = _held_at_most(pid, connections) - before
            crowd.wait_until_closed(120)
        left = descriptors_of(pid) - before
    each = cost.peak_bytes / max(held, 1)
    print(
        f"{connections:,} half-open connections: {held:,} held at once, {each / 1000:.1f} kB each; {cost}; {left} left"
    )
    return [f"{left} descriptors are left of half-open connections"] if left > 10 else []


def _held_at_most(pid: int, connections: int) -> int:
    """Return the worker's descriptors once it has taken so many connections, or no more for 5 s."""
    most, grown_s = 0, time.monotonic()
    while most < connections and time.monotonic() - grown_s < 5:
        if (found := descriptors_of(pid)) > most:
            most, grown_s = found, time.monotonic()
        time.sleep(0.05)
    return most


def keys(count: int, name: str) -> list[str]:
    """Ask with so many keys, and look at what grew once the ledger has all of it."""
    status, body = ANSWERS[name]
    with Upstream(status, body) as upstream, LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        warm_up = max(count // 10, 1)
        _ask(proxy, status, range(warm_up))
        _wait_for_records(proxy, warm_up)
        pids = {"worker": worker_of(proxy), "ledger process": ledger_of(proxy)}
        before = {part: memory_of(pid) for part, pid in pids.items()}
        began_s = time.monotonic()
        with attacked(proxy) as cost:
            _ask(proxy, status, range(warm_up, count))
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


def _ask(proxy: LiveProxy, status: str, numbers: range) -> None:
    """Ask with each key once, from several connections; each must be answered with this status."""
    failures: list[BaseException] = []

    def ask(share: range) -> None:
        try:
            with proxy.connect(60) as sock:
                for start in range(0, len(share), PIPELINED):
                    _ask_at_once(sock, status, share[start : start + PIPELINED])
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=ask, args=(numbers[number::CLIENTS],)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _ask_at_once(sock: socket.socket, status: str, numbers: range) -> None:
    requests = [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy.example\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (key.encode(), len(BODY), BODY)
        for number in numbers
        for key in garbage_keys(1, first=number)
    ]
    sock.sendall(b"".join(requests))
    answers = b""
    while answers.count(END) < len(requests):
        more = sock.recv(65536)
        assert more, f"the connection was closed behind {answers[-500:]!r}"
        answers += more
    assert answers.count(f"HTTP/1.1 {status}".encode()) == len(requests), answers[:500]


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
