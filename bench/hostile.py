"""What one attack of `python -m bench.abuse` each sends, in full: heads, bodies, answers and frames made to hurt."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gateway.tests.attacks import HEAD, MIB, Cost, Crowd, attacked, memory_of, worker_of
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.hostile import BOMBS, ENDLESS, FLOODS, SHAKE, bomb, hold_websocket, swallow
from gateway.tests.live import LiveProxy

AT_ONCE = 16
ZIP_BYTES = 1024 * MIB
ENDLESS_BYTES = 256 * MIB
SOCKETS = 200
HEADS = 200
MOST_BYTES = 400 * MIB  # of the worker, above what it has at rest
CHAT = b'{"model":"gpt-4o-mini","stream":%b,"messages":[{"role":"user","content":"hi"}]}'


@dataclass
class Place:
    """One worker that all attacks hit, so that its memory is looked at above what it had before the first of them."""

    upstream: FakeUpstream
    proxy: LiveProxy
    misses: list[str] = field(default_factory=list)
    at_rest_bytes: int = 0

    @contextlib.contextmanager
    def attack(self, name: str, most_bytes: int) -> Iterator[None]:
        """Measure, say what it cost, and note it if that was too much or the ordinary client was not answered."""
        found: Cost | None = None
        before = memory_of(worker_of(self.proxy))
        try:
            with attacked(self.proxy) as cost:
                found = cost
                yield
        except AssertionError as exc:
            self.misses.append(f"{name}: {exc}")
        if found is not None:
            above = before + found.peak_bytes - self.at_rest_bytes
            others = f"{found.answered} others answered, the slowest in {found.slowest_s:.2f} s"
            print(f"{name:44} {above / MIB:6.1f} MiB; {others}", flush=True)
            # Freed memory stays with the process: what the attack before has left is none of this one's.
            if found.peak_bytes > most_bytes or above > MOST_BYTES:
                self.misses.append(f"{name} took {found.peak_bytes / MIB:.0f} MiB, {above / MIB:.0f} MiB above rest")
        self.upstream.script = swallow
        self.upstream.requests.clear()


def all_attacks(connections: int) -> list[str]:
    """Make them one after the other on one worker, and return what was missed."""
    with FakeUpstream(swallow) as upstream, LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        for _ in range(20):
            proxy.get("/v1/models")
        place = Place(upstream, proxy, at_rest_bytes=memory_of(worker_of(proxy)))
        print(f"a worker of {place.at_rest_bytes / MIB:.0f} MiB at rest, and above that at most:")
        with place.attack(f"{connections:,} heads that hardly come", connections * 30_000):
            print(f"  ended after {_trickle(proxy, connections):.0f} s")
        with place.attack(f"{HEADS} heads of 1 MB, {AT_ONCE} at once", 30 * MIB):
            _at_once(HEADS, lambda: _send_head(proxy))
        for kind, body in BOMBS.items():
            with place.attack(f"{AT_ONCE} bodies: {kind}", 400 * MIB):
                _at_once(AT_ONCE, lambda body=body: _post(proxy, body))  # type: ignore[misc]
        packed = bomb(ZIP_BYTES)
        for kind, content_type in (("JSON", b"application/json"), ("events", b"text/event-stream")):
            upstream.script = _packed(packed, content_type.decode())
            with place.attack(f"{AT_ONCE} answers of 1 GiB, packed: {kind}", 300 * MIB):
                _at_once(AT_ONCE, lambda kind=kind: _post(proxy, CHAT % _stated(kind == "events")))  # type: ignore[misc]
        for kind, piece in ENDLESS.items():
            upstream.script = _endless(piece)
            with place.attack(f"{AT_ONCE} events of 256 MiB: {kind}", 150 * MIB):
                _at_once(AT_ONCE, lambda: _post(proxy, CHAT % b"true"))
        for kind, flood in FLOODS.items():
            gate = Gate()
            upstream.script = _silent(gate)
            with place.attack(f"{SOCKETS} websockets: {kind}", SOCKETS * 3 * MIB // 2):
                try:
                    _flood(proxy, flood)
                finally:
                    gate.open()
    return place.misses


def _stated(is_so: bool) -> bytes:
    return b"true" if is_so else b"false"


def _at_once(times: int, act: Callable[[], None]) -> None:
    """Do something so many times, from several threads."""
    left = threading.Semaphore(times)

    def work() -> None:
        while left.acquire(blocking=False):
            act()

    threads = [threading.Thread(target=work) for _ in range(min(AT_ONCE, times))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Clients


def _trickle(proxy: LiveProxy, connections: int) -> float:
    """Send a field now and then on each connection, until the gateway has closed all; return how long that took."""
    with Crowd(proxy) as crowd:
        began_s = time.monotonic()
        crowd.join(connections, b"GET /v1/models HTTP/1.1\r\nHost: h\r\n")
        while crowd.send(b"X: y\r\n"):
            if time.monotonic() - began_s > 300:
                raise AssertionError("heads that hardly come are waited for")
            time.sleep(0.5)
        return time.monotonic() - began_s


def _send_head(proxy: LiveProxy) -> None:
    with proxy.connect(60) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: h\r\nX-Long: ")
        for _ in range(16):
            sock.sendall(b"x" * 65536)
        _read_all(sock)


def _post(proxy: LiveProxy, body: bytes) -> None:
    """Ask, and read whatever comes until the connection is closed."""
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with proxy.connect(120) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(head + body)
        _read_all(sock)


def _read_all(sock: socket.socket) -> None:
    while sock.recv(262_144):
        pass


def _flood(proxy: LiveProxy, flood: bytes) -> None:
    with Crowd(proxy) as crowd:
        crowd.join(SOCKETS, SHAKE)
        for sock in crowd.sockets:
            if not sock.recv(65536).startswith(b"HTTP/1.1 101 "):
                raise AssertionError("a websocket was refused")
            sock.settimeout(0.05)
        for _ in range(10):
            crowd.send(flood)


# Upstreams; the ordinary client asks by GET


def _packed(packed: bytes, content_type: str) -> Callable[[Exchange], object]:
    async def script(exchange: Exchange) -> None:
        if exchange.request.method == "GET":
            return await swallow(exchange)
        await exchange.read_body()
        await exchange.answer(packed, headers=(("content-type", content_type), ("content-encoding", "gzip")))

    return script


def _endless(piece: bytes) -> Callable[[Exchange], object]:
    async def script(exchange: Exchange) -> None:
        if exchange.request.method == "GET":
            return await swallow(exchange)
        await exchange.read_body()
        await exchange.start_stream()
        for _ in range(ENDLESS_BYTES // len(piece)):
            await exchange.chunk(piece)
        await exchange.end_stream()

    return script


def _silent(gate: Gate) -> Callable[[Exchange], object]:
    async def script(exchange: Exchange) -> None:
        if exchange.request.value("upgrade") is None:
            return await swallow(exchange)
        await hold_websocket(exchange, gate)

    return script
