"""The proxy under test: started by the production command, in a process and a VAR_DIR of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psycopg
from psycopg.sql import SQL, Identifier

ROOT = Path(__file__).resolve().parents[2]
# Only a failing test waits so long.
START_PATIENCE_S = 120.0
PATIENCE_S = 60.0
# What a developer may have set for a proxy of his own must not reach the one under test.
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "DATABASE_URL", "REDIS_URL", "CI")


class LiveProxy:
    """`with LiveProxy(UPSTREAM_URL=...) as proxy:` serves on `proxy.url` until the block ends."""

    def __init__(self, *, var_dir: Path | None = None, **environment: str) -> None:
        self._own_var_dir = var_dir is None
        self.var_dir = var_dir or Path(tempfile.mkdtemp(prefix="proxysite-"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.var_dir / "server.log"
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self.environment = kept | {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "VAR_DIR": str(self.var_dir),
            "PYTHONUNBUFFERED": "1",
            "REDIS_KEY_PREFIX": self.var_dir.name,
            # A process more, which few tests need.
            "CELERY_EMBEDDED": "false",
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.setup_output = ""
        self._database = ""
        self._shared_database_url = ""

    def __enter__(self) -> LiveProxy:
        try:
            self.set_up()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def set_up(self) -> None:
        """Do what `manage.py setup` does; by a copy of what it did once where nothing asks for more than that."""
        if self._own_var_dir and self._database_url == os.environ.get("DATABASE_URL", ""):
            self._copy(_instance_set_up())
        else:
            self._create_database()
            self.setup_output = self.manage("setup")

    def _copy(self, original: LiveProxy) -> None:
        shutil.copytree(original.var_dir, self.var_dir, dirs_exist_ok=True)
        self._create_database(template=original._database)
        self.setup_output = original.setup_output

    @property
    def _database_url(self) -> str:
        return self.environment.get("DATABASE_URL", "")

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._drop_database()
        if self._own_var_dir:
            shutil.rmtree(self.var_dir, ignore_errors=True)

    def _create_database(self, template: str = "template1") -> None:
        """On a database server each proxy has a database of its own, as it has a file of its own on SQLite."""
        shared = self._database_url
        if shared.startswith("postgres"):
            self._database = f"proxysite_live_{secrets.token_hex(6)}"
            create = SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(self._database), Identifier(template))
            with psycopg.connect(shared, autocommit=True) as connection:
                connection.execute(create)
            self._shared_database_url = shared
            self.environment["DATABASE_URL"] = shared.rpartition("/")[0] + "/" + self._database

    def _drop_database(self) -> None:
        if self._database:
            with psycopg.connect(self._shared_database_url, autocommit=True) as connection:
                name = Identifier(self._database)
                connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))

    def manage(self, *arguments: str) -> str:
        """Run one management command with the proxy's settings and return what it printed."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        if done.returncode != 0:
            raise RuntimeError(f"manage.py {arguments[0]} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        """Return what a query finds in the proxy's own database, read from outside of it."""
        if self._database:
            with psycopg.connect(self.environment["DATABASE_URL"]) as connection:
                return connection.execute(statement.encode()).fetchall()
        with contextlib.closing(sqlite3.connect(self.var_dir / "db.sqlite3", timeout=20)) as connection:
            return connection.execute(statement).fetchall()

    def wait_for_rows(self, statement: str, count: int, timeout_s: float = PATIENCE_S) -> list[tuple[Any, ...]]:
        """Return the rows once there are `count` of them: the journal is flushed every now and then."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.rows(statement)) < count:
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(found)} rows instead of {count}; {self.log[-2000:]}")
            time.sleep(0.05)
        return found

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "serve"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_PATIENCE_S
        while not self._is_alive():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the proxy did not start:\n{self.log}")
            time.sleep(0.05)

    def _is_alive(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/healthz", timeout=PATIENCE_S) as answer:
            return bool(answer.status == 200)
        return False

    def stop(self, sig: signal.Signals = signal.SIGTERM, *, timeout_s: float = PATIENCE_S) -> int | None:
        """Send a signal to the master and return its exit code once it has ended."""
        if self.process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait(PATIENCE_S)

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    @property
    def worker_pids(self) -> list[int]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def worker_rss_bytes(self) -> int:
        """Return the resident memory of all workers."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.worker_pids]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def request(self, method: str, target: str, **options: Any) -> httpx.Response:
        """Send one request with a client of its own."""
        with new_client() as client:
            return client.request(method, self.url + target, **options)

    def get(self, target: str, **options: Any) -> httpx.Response:
        return self.request("GET", target, **options)

    def post(self, target: str, **options: Any) -> httpx.Response:
        return self.request("POST", target, **options)

    def connect(self, timeout_s: float = PATIENCE_S) -> socket.socket:
        """Return a raw connection, for bytes that no HTTP library would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)


@contextlib.contextmanager
def instance(**environment: str) -> Iterator[LiveProxy]:
    """Yield a proxy that is set up and serves nothing yet: `start` it once all else is as the test wants it."""
    proxy = LiveProxy(var_dir=None, **environment)
    try:
        proxy.set_up()
        yield proxy
    finally:
        proxy.__exit__()


@functools.cache
def _instance_set_up() -> LiveProxy:
    """Return an instance that never serves: most others begin as a copy, which takes a hundredth of the time."""
    original = LiveProxy()
    atexit.register(remove_instance_set_up)
    original._create_database()
    original.setup_output = original.manage("setup")
    return original


def remove_instance_set_up() -> None:
    if _instance_set_up.cache_info().currsize:
        _instance_set_up().__exit__()
        _instance_set_up.cache_clear()


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def new_client() -> httpx.Client:
    # Unverified because it is cheap: loading the system's roots takes longer than most tests.
    return httpx.Client(verify=False, trust_env=False, timeout=PATIENCE_S)


def free_port() -> int:
    """Return a port that nobody else is given until somebody binds it, seconds later perhaps.

    None of those that the system hands out by itself, and none of another test worker's.
    """
    while True:
        port = next(_ports)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _own_ports() -> Iterator[int]:
    first_handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(10_100, max(first_handed_out, 20_000))  # above the last that a browser refuses to ask
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = ports[worker % workers :: workers]
    start = secrets.randbelow(len(own))
    return itertools.cycle([*own[start:], *own[:start]])


_ports = _own_ports()
