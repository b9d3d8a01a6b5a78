"""Workers killed, the database away, the disk full, all under load: what a client saw complete is recorded once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.full_disks import mount_tmpfs
from gateway.tests.live import LiveProxy, new_client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 8
# Each of them, between two requests: a load, and not all that the machine can do.
PAUSE_S = 0.05
# Longer than SQLite waits for a lock.
AWAY_LONG_S = 25.0
AWAY_S = 10.0
PATIENCE_S = 120.0
# What is answered at all is answered within this, on a busy machine too; who waits for a database waits for longer.
ANSWERED_WITHIN_S = 5.0
KEY = {"authorization": "Bearer sk-crash-test-key"}


class Metered:
    """A script that answers chat completions, whole or streamed, each with an id and a usage of its own."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    async def __call__(self, exchange: Exchange) -> None:
        content = await exchange.read_body()
        if not exchange.request.complete:
            return  # whoever sent it has been killed
        body = json.loads(content)
        number = next(self._numbers)
        usage = {"prompt_tokens": number, "completion_tokens": 2, "total_tokens": number + 2}
        request_id = ("x-request-id", f"req-{number}")
        if not body.get("stream"):
            answer = {"object": "chat.completion", "model": "gpt-4o-mini", "choices": [], "usage": usage}
            await exchange.answer(
                json.dumps(answer).encode(), headers=(("content-type", "application/json"), request_id)
            )
            return
        await exchange.start_stream(headers=(("content-type", "text/event-stream"), request_id))
        chunk = {"object": "chat.completion.chunk", "model": "gpt-4o-mini"}
        delta = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
        await exchange.events(*[{**chunk, **delta}] * 5, {**chunk, "choices": [], "usage": usage})
        await exchange.end_stream()


@dataclass
class Load:
    """Clients that send one request after another until the block ends, and remember what they saw."""

    proxy: LiveProxy
    completed: dict[str, float] = field(default_factory=dict)  # request id: when
    failed: list[tuple[float, str]] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()
        self.wait_for_more(50)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        body = {"model": "gpt-4o-mini", "messages": [], "stream": bool(number % 2)}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        with new_client() as client:
            while not self._is_over.is_set():
                try:
                    answer = client.post(f"{self.proxy.url}/v1/chat/completions", json=body, headers=KEY)
                    is_complete = answer.status_code == 200 and answer.content.endswith((b"}", b"data: [DONE]\n\n"))
                    failure = "" if is_complete else f"{answer.status_code} {answer.text[-200:]}"
                except httpx.HTTPError as exc:
                    failure = repr(exc)
                with self._changed:
                    if failure:
                        self.failed.append((time.monotonic(), failure))
                    else:
                        self.completed[answer.headers["x-request-id"]] = time.monotonic()
                    self._changed.notify_all()
                self._is_over.wait(PAUSE_S)

    def wait_for_more(self, requests: int) -> None:
        with self._changed:
            enough = len(self.completed) + requests
            assert self._changed.wait_for(lambda: len(self.completed) >= enough, PATIENCE_S), self.failed[-3:]

    def go_on_for(self, seconds: float) -> None:
        """Return once that time has passed, during all of which requests were answered."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            part_end = time.monotonic() + ANSWERED_WITHIN_S
            with self._changed:
                before = len(self.completed)
                while (left := part_end - time.monotonic()) > 0:
                    self._changed.wait(left)
                assert len(self.completed) > before, f"nothing was answered; {self.failed[-3:]}"


def assert_recorded_once(proxy: LiveProxy, load: Load) -> None:
    """Every complete answer has exactly one record with the usage that it reported; no request has two."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        rows = proxy.rows("SELECT upstream_request_id, input_tokens, usage_source FROM billing_usagerecord")
        missing = load.completed.keys() - {request_id for request_id, _, _ in rows}
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert not missing, f"{len(missing)} of {len(load.completed)}: {sorted(missing)[:5]}\n{proxy.log[-3000:]}"
    counts = Counter(request_id for request_id, _, _ in rows if request_id)
    assert {request_id for request_id, count in counts.items() if count > 1} == set()
    for request_id, input_tokens, source in rows:
        if request_id in load.completed:
            assert (f"req-{input_tokens}", source) == (request_id, "upstream")


@pytest.fixture
def metered_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(Metered()) as upstream:
        yield upstream
        assert not upstream.failures


# A killed worker


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_under_load_loses_and_doubles_nothing(metered_upstream: FakeUpstream, workers: int) -> None:
    kills = 3
    # A long interval leaves much to adopt.
    environment = {"WORKERS": str(workers), "JOURNAL_FLUSH_SECONDS": "3"}
    with LiveProxy(UPSTREAM_URL=metered_upstream.url, **environment) as proxy:
        with Load(proxy) as load:
            killed_at = []
            for _ in range(kills):
                doomed = proxy.worker_pids[0]
                killed_at.append(time.monotonic())
                os.kill(doomed, signal.SIGKILL)
                _wait_until(lambda doomed=doomed: doomed not in proxy.worker_pids)
                _wait_until(lambda: len(proxy.worker_pids) == workers)
                load.wait_for_more(200)
        assert_recorded_once(proxy, load)
        assert "adopted" in proxy.log
    # Only what was under way at a worker dies with it.
    assert len(load.failed) <= kills * CLIENTS
    for failed_at, failure in load.failed:
        assert any(0 <= failed_at - at < 10 for at in killed_at), failure


def test_a_killed_ledger_process_under_load_loses_and_doubles_nothing(metered_upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=metered_upstream.url) as proxy:
        with Load(proxy) as load:
            for _ in range(3):
                (doomed,) = _ledger_pids(proxy)
                os.kill(doomed, signal.SIGKILL)
                load.wait_for_more(100)
                _wait_until(lambda doomed=doomed: len(_ledger_pids(proxy) - {doomed}) == 1)
        assert_recorded_once(proxy, load)
    assert load.failed == []


def test_what_a_killed_instance_left_is_recorded_by_the_next(metered_upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=metered_upstream.url, JOURNAL_FLUSH_SECONDS="30") as proxy:
        with Load(proxy) as load:
            load.wait_for_more(300)
        assert proxy.process is not None
        os.killpg(proxy.process.pid, signal.SIGKILL)
        proxy.process.wait()
        # The workers may end a little later.
        _wait_until(lambda: "owner live" not in proxy.manage("journal", "status"))
        assert "owner dead" in proxy.manage("journal", "status")
        printed = proxy.manage("journal", "replay")
        assert not printed.startswith("0 recorded")
        assert_recorded_once(proxy, load)
        proxy.start()
    assert load.failed == []


# The database away


@contextlib.contextmanager
def database_away(proxy: LiveProxy) -> Iterator[None]:
    """PostgreSQL lets nobody in; SQLite is locked by somebody else."""
    if proxy.environment.get("DATABASE_URL", "").startswith("postgres"):
        name = proxy.environment["DATABASE_URL"].rpartition("/")[2]
        allow = SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {}")
        with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as server:
            server.execute(allow.format(Identifier(name), SQL("false")))
            try:
                server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = %s AND usename = current_user",
                    [name],
                )
                yield
            finally:
                server.execute(allow.format(Identifier(name), SQL("true")))
        return
    with contextlib.closing(sqlite3.connect(proxy.var_dir / "db.sqlite3", isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


@pytest.mark.parametrize(("workers", "away_s"), [(1, AWAY_LONG_S), (2, AWAY_S)])
def test_a_database_away_under_load_stops_nothing_and_loses_nothing(
    metered_upstream: FakeUpstream, workers: int, away_s: float
) -> None:
    with LiveProxy(UPSTREAM_URL=metered_upstream.url, WORKERS=str(workers)) as proxy:
        with Load(proxy) as load:
            with database_away(proxy):
                load.go_on_for(away_s)
                assert _waiting_bytes(proxy) > 10_000
                if away_s >= AWAY_LONG_S:
                    _wait_until(lambda: "the ledger takes no events" in proxy.log)
            load.wait_for_more(200)
        assert_recorded_once(proxy, load)
    assert load.failed == []


def test_a_worker_killed_while_the_database_is_away_loses_nothing(metered_upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=metered_upstream.url, WORKERS="2") as proxy:
        with Load(proxy) as load:
            with database_away(proxy):
                load.wait_for_more(300)
                doomed = proxy.worker_pids[0]
                os.kill(doomed, signal.SIGKILL)
                _wait_until(lambda: doomed not in proxy.worker_pids)
                load.wait_for_more(300)
            load.wait_for_more(100)
        assert_recorded_once(proxy, load)
    assert len(load.failed) <= CLIENTS


# The disk full


class JournalDisk:
    """A disk for the journal alone that can be full; without the right to mount one, a place that takes no files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files_at = directory / "journal"
        directory.mkdir()
        self.is_mounted = mount_tmpfs(directory, size="256k")

    def fill(self) -> None:
        if self.is_mounted:
            with contextlib.suppress(OSError), (self.directory / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(b"x" * 4096)
        else:
            self._files_at.rename(self.directory / "elsewhere")
            self._files_at.touch()

    def free(self) -> None:
        if self.is_mounted:
            (self.directory / "ballast").unlink(missing_ok=True)
        else:
            self._files_at.unlink()

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.directory)], check=True)


@pytest.fixture
def journal_disk(tmp_path: Path) -> Iterator[JournalDisk]:
    disk = JournalDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_under_load_raises_an_alarm_and_loses_nothing(
    metered_upstream: FakeUpstream, journal_disk: JournalDisk, workers: int
) -> None:
    environment = {"JOURNAL_DIR": str(journal_disk.directory / "journal"), "WORKERS": str(workers)}
    with LiveProxy(UPSTREAM_URL=metered_upstream.url, **environment) as proxy:
        with Load(proxy) as load:
            journal_disk.fill()
            _wait_until(lambda: "cannot be written" in proxy.get("/readyz").json()["checks"]["journal"])
            load.go_on_for(5)
            journal_disk.free()
            load.wait_for_more(100)
        assert_recorded_once(proxy, load)
        assert proxy.log.count("the journal cannot be written") <= 2 * workers
    assert load.failed == []


def test_a_full_disk_and_a_database_away_at_once_lose_nothing(
    metered_upstream: FakeUpstream, journal_disk: JournalDisk
) -> None:
    with LiveProxy(UPSTREAM_URL=metered_upstream.url, JOURNAL_DIR=str(journal_disk.directory / "journal")) as proxy:
        with Load(proxy) as load:
            with database_away(proxy):
                journal_disk.fill()
                load.go_on_for(5)
            load.wait_for_more(100)
            journal_disk.free()
            load.wait_for_more(100)
        assert_recorded_once(proxy, load)
    assert load.failed == []


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ledger_pids(proxy: LiveProxy) -> set[int]:
    """Return the processes of the workers that record."""
    found = set()
    for worker in proxy.worker_pids:
        for children in Path("/proc").glob(f"{worker}/task/*/children"):
            with contextlib.suppress(OSError):  # gone since it was listed
                found |= {int(pid) for pid in children.read_text().split() if _is_ledger(int(pid))}
    return found


def _is_ledger(pid: int) -> bool:
    try:
        return b"ledger_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _waiting_bytes(proxy: LiveProxy) -> int:
    directory = Path(proxy.environment.get("JOURNAL_DIR", proxy.var_dir / "journal"))
    return sum(path.stat().st_size for path in directory.glob("*.journal"))
