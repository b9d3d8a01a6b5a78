"""What somebody does who wants a gateway down, and what it costs the gateway meanwhile.

Beside the attack an ordinary client asks on, one request after the other, on a connection of its own each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gateway.tests.live import LiveProxy

MIB = 1 << 20
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
# How long another client may have to wait: a second at most where nothing else runs.
ANSWERED_WITHIN_S = 30.0


@dataclass
class Cost:
    """What the worker took beside what it had: the most at any time, in bytes, and its descriptors afterwards."""

    peak_bytes: int = 0
    answered: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.peak_bytes / MIB:.1f} MiB; {self.answered} others answered, the slowest in {self.slowest_s:.2f} s"
        )


def worker_of(proxy: LiveProxy) -> int:
    """Return the one worker of a proxy with WORKERS=1 and no embedded Celery."""
    (pid,) = proxy.worker_pids
    return pid


def ledger_of(proxy: LiveProxy) -> int:
    """Return the process in which the worker's events are recorded."""
    worker = worker_of(proxy)
    for children in Path(f"/proc/{worker}/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):  # gone since it was listed
                if b"proxysite.ledger_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    raise AssertionError("the worker has no process for its ledger")


def memory_of(pid: int) -> int:
    """Return the resident memory of one process, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def heap_of(pid: int) -> int:
    """Return what of a process's resident memory no file stands behind, in bytes: the kernel takes none of it back."""
    return _status_bytes(pid, "RssAnon")


def descriptors_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _status_bytes(pid: int, field_name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field_name}:"))


@contextlib.contextmanager
def attacked(proxy: LiveProxy) -> Iterator[Cost]:
    """Measure an attack; the ordinary client must have been answered all along, and the worker must be the same."""
    pid = worker_of(proxy)
    cost = Cost()
    over = threading.Event()
    bystander = threading.Thread(target=_ask_on, args=(proxy, cost, over))
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
    before = memory_of(pid)
    bystander.start()
    try:
        yield cost
        _wait_for(lambda: cost.answered or cost.failures)
    finally:
        over.set()
        bystander.join()
    assert worker_of(proxy) == pid
    cost.peak_bytes = max(_status_bytes(pid, "VmHWM") - before, 0)
    assert not cost.failures, cost.failures[:3]
    assert cost.slowest_s < ANSWERED_WITHIN_S, cost


def _ask_on(proxy: LiveProxy, cost: Cost, over: threading.Event) -> None:
    while not over.is_set():
        began_s = time.monotonic()
        try:
            answer = proxy.get("/v1/models", headers={"Authorization": "Bearer sk-bystander-000000000000"})
            if answer.status_code not in (200, 401):
                cost.failures.append(f"{answer.status_code} {answer.text[:200]}")
        except Exception as exc:
            cost.failures.append(f"{type(exc).__name__}: {exc}")
        cost.answered += 1
        cost.slowest_s = max(cost.slowest_s, time.monotonic() - began_s)
        over.wait(0.02)


def _wait_for(is_so: object, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Crowd:
    """Many raw connections to a proxy at once; all are closed at the end of the block."""

    def __init__(self, proxy: LiveProxy) -> None:
        self._proxy = proxy
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Crowd:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for sock in self.sockets:
            sock.close()

    def join(self, count: int, first: bytes = b"") -> None:
        """Open so many more connections; each sends `first`."""
        for _ in range(count):
            sock = self._proxy.connect()
            self.sockets.append(sock)
            if first:
                sock.sendall(first)

    def send(self, data: bytes) -> int:
        """Have each connection send this, and return how many still could."""
        sent = 0
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sent += 1
        return sent

    def wait_until_closed(self, timeout_s: float) -> None:
        """Wait until the proxy has closed every connection."""
        deadline = time.monotonic() + timeout_s
        for sock in self.sockets:
            sock.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(ConnectionError):
                while sock.recv(65536):
                    pass


def garbage_keys(count: int, *, first: int = 0) -> Iterable[str]:
    return (f"sk-garbage-{number:012d}" for number in range(first, first + count))
