"""Periodic work really runs: beside the gateway with no broker server, and by itself with one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import redis
from django.conf import settings
from kombu import Connection

from billing.tests.conftest import redis_url as redis_url
from billing.tests.price_server import PriceServer, published
from gateway.tests.live import ROOT, LiveProxy, instance
from proxysite.tasks import heartbeat

PATIENCE_S = 180.0
BEATS = "SELECT last_succeeded_at FROM proxysite_taskrun WHERE task = 'proxysite.tasks.heartbeat'"
RABBITMQ_URL = "amqp://guest:guest@127.0.0.1:5672/"


def wait_until(is_so: Callable[[], object], proxy: LiveProxy) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, proxy.log[-3000:]
        time.sleep(0.05)


def wait_for_beats(proxy: LiveProxy, more: int = 1) -> None:
    """Return once the heartbeat has succeeded that many more times."""
    for _ in range(more):
        before = proxy.rows(BEATS)
        wait_until(lambda before=before: proxy.rows(BEATS) not in (before, [(None,)]), proxy)


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of a process's children, and of theirs."""
    found: dict[int, str] = {}
    for children in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # gone since it was listed
            for child in map(int, children.read_text().split()):
                with contextlib.suppress(OSError):
                    found[child] = Path(f"/proc/{child}/cmdline").read_text()
                    found |= descendants(child)
    return found


def celery_pids(proxy: LiveProxy) -> list[int]:
    assert proxy.process is not None
    return [pid for pid, command in descendants(proxy.process.pid).items() if "celery_process" in command]


def are_gone(pids: Iterable[int]) -> bool:
    # Whoever became their parent may not have taken note of their end.
    return not any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in pids)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


@pytest.fixture(scope="module")
def _shared() -> Iterator[LiveProxy]:
    with LiveProxy(CELERY_EMBEDDED="true", HEARTBEAT_SECONDS="1", WORKERS="2") as proxy:
        yield proxy


@pytest.fixture
def embedded(_shared: LiveProxy) -> LiveProxy:
    """Two workers and the embedded Celery, whose heart beats every second."""
    wait_for_beats(_shared)
    return _shared


# Embedded


def test_with_nothing_set_the_tasks_run_and_do_their_work() -> None:
    with instance() as proxy:
        proxy.manage("seed_usage", "50", "--until", "2024-01-31")
        del proxy.environment["CELERY_EMBEDDED"]
        proxy.start()
        wait_for_beats(proxy)
        purged = "SELECT rows FROM proxysite_taskrun WHERE outcome = 'succeeded' AND rows > 0"
        assert proxy.wait_for_rows(purged, 1, PATIENCE_S) == [(50,)]
        assert proxy.rows("SELECT event_id FROM billing_usagerecord") == []
        wait_until(lambda: "50 usage records were purged" in proxy.log, proxy)
        tasks = proxy.get("/readyz").json()["tasks"]
        assert {tasks[name]["state"] for name in ("heartbeat", "purge_usage")} == {"ok"}


def test_readyz_shows_a_late_task_and_stays_green() -> None:
    with LiveProxy() as proxy:
        answer = proxy.get("/readyz")
        assert answer.json()["tasks"]["heartbeat"] == {"state": "never", "last_succeeded_at": None, "age_s": None}
        proxy.manage("shell", "-c", _AN_OLD_BEAT)
        answer = proxy.get("/readyz")
        assert answer.status_code == 200
        assert answer.json()["tasks"]["heartbeat"]["state"] == "late"
        assert answer.json()["tasks"]["heartbeat"]["age_s"] >= 3600


_AN_OLD_BEAT = """
from datetime import timedelta
from django.utils import timezone
from proxysite.models import TaskRun
at = timezone.now() - timedelta(hours=1)
TaskRun.objects.create(task="proxysite.tasks.heartbeat", last_started_at=at, last_succeeded_at=at)
"""


def test_there_is_one_whatever_the_number_of_workers(embedded: LiveProxy) -> None:
    assert len(celery_pids(embedded)) == 1
    (pid,) = celery_pids(embedded)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(own + 10, 19)


def test_a_killed_one_is_started_anew(embedded: LiveProxy) -> None:
    (killed,) = celery_pids(embedded)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in celery_pids(embedded) and celery_pids(embedded), embedded)
    wait_for_beats(embedded, 2)
    wait_until(lambda: "ended by itself and is started anew" in embedded.log, embedded)


def test_a_reload_starts_one_anew_and_never_two(embedded: LiveProxy) -> None:
    (before,) = celery_pids(embedded)
    assert embedded.process is not None
    most = 0

    def is_replaced() -> bool:
        nonlocal most
        now = celery_pids(embedded)
        most = max(most, len(now))
        return bool(now) and before not in now

    embedded.process.send_signal(signal.SIGHUP)
    wait_until(is_replaced, embedded)
    assert most == 1
    wait_for_beats(embedded, 2)


def test_a_second_one_in_the_same_folder_waits_for_the_first_to_end(embedded: LiveProxy) -> None:
    command = [sys.executable, "-m", "proxysite.celery_process"]
    with (
        embedded.log_path.open("ab") as log,
        subprocess.Popen(command, cwd=ROOT, env=embedded.environment, stdout=log, stderr=log) as second,
    ):
        try:
            wait_until(lambda: _is_waiting_for_a_lock(second.pid), embedded)
            embedded.stop()
            wait_for_beats(embedded)
            embedded.start()
        finally:
            second.terminate()


def _is_waiting_for_a_lock(pid: int) -> bool:
    locks = Path("/proc/locks").read_text().splitlines()
    return any("-> FLOCK" in line and f" {pid} " in line for line in locks)


def test_old_and_damaged_messages_do_not_pile_up(embedded: LiveProxy) -> None:
    folder = embedded.var_dir / "celery" / "messages"
    queue = embedded.environment["REDIS_KEY_PREFIX"]
    embedded.stop()
    expired, unending = _message(expires="2026-01-01T00:00:00+00:00"), _message(expires=None)
    for number in range(300):
        (folder / f"{number}_expired.{queue}.msg").write_text(expired)
        stale = folder / f"{number}_stale.{queue}.msg"
        stale.write_text(unending)
        os.utime(stale, (1, 1))
    (folder / f"0_damaged.{queue}.msg").write_text('{"body": "')
    (folder / f"1_damaged.{queue}.msg").write_text("{}")
    embedded.start()
    wait_until(lambda: not list(folder.glob("*expired*")) and not list(folder.glob("*damaged*")), embedded)
    assert not list(folder.glob("*stale*"))
    wait_for_beats(embedded, 3)
    wait_until(lambda: len(list(folder.parent.rglob("*.msg"))) < 5, embedded)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_files_that_a_full_disk_has_cut_stop_nothing(embedded: LiveProxy) -> None:
    folder = embedded.var_dir / "celery"
    embedded.stop()
    (exchange,) = (folder / "control").glob("*.exchange")
    whole = exchange.read_text()
    exchange.write_text("")
    _cut_messages(embedded)
    log_chars = len(embedded.log)
    embedded.start()
    wait_for_beats(embedded, 2)
    assert exchange.read_text() == whole
    assert not list(folder.rglob("*_cut.*"))
    assert "Traceback" not in embedded.log[log_chars:]
    # Of those that come while it runs one may end it; the next process starts without the others.
    _cut_messages(embedded)
    wait_until(lambda: not list(folder.rglob("*_cut.*")), embedded)
    wait_for_beats(embedded, 2)


def _cut_messages(proxy: LiveProxy) -> None:
    """Leave what a disk that is full has of messages: nothing, or their beginning."""
    queue = proxy.environment["REDIS_KEY_PREFIX"]
    for number in range(20):
        message = proxy.var_dir / "celery" / "messages" / f"{number}_cut.{queue}.msg"
        message.write_text("" if number % 2 else '{"body": "')


def _message(*, expires: str | None) -> str:
    """Return a heartbeat as beat writes it into the folder."""
    heartbeat.apply_async()
    (path,) = (settings.CELERY_DIR / "messages").glob("*.msg")
    message = json.loads(path.read_text())
    path.unlink()
    message["headers"]["expires"] = expires
    return json.dumps(message)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_behind_after_a_stop(sig: signal.Signals) -> None:
    with LiveProxy(CELERY_EMBEDDED="true", HEARTBEAT_SECONDS="1") as proxy:
        wait_for_beats(proxy)
        assert proxy.process is not None
        family = descendants(proxy.process.pid)
        assert any("celery_process" in command for command in family.values())
        assert proxy.stop(sig) == 0
        wait_until(lambda: are_gone(family), proxy)
        assert "Traceback" not in proxy.log


def test_nothing_is_left_behind_when_the_master_is_killed() -> None:
    with LiveProxy(CELERY_EMBEDDED="true", HEARTBEAT_SECONDS="1") as proxy:
        wait_for_beats(proxy)
        assert proxy.process is not None
        family = descendants(proxy.process.pid)
        proxy.stop(signal.SIGKILL)
        wait_until(lambda: are_gone(family), proxy)
        proxy.start()  # the port and the lock are free
        wait_for_beats(proxy)


def test_two_instances_have_a_broker_each() -> None:
    with (
        LiveProxy(CELERY_EMBEDDED="true", HEARTBEAT_SECONDS="1") as one,
        LiveProxy(CELERY_EMBEDDED="true", HEARTBEAT_SECONDS="1") as other,
    ):
        wait_for_beats(one)
        wait_for_beats(other)
        one.stop()
        wait_for_beats(other, 2)


def test_prices_are_refreshed_and_a_failure_is_told() -> None:
    rows = published(**{"gpt-4o": {"input_mtok": "2", "output_mtok": "9"}})
    with PriceServer(rows) as server:
        wanted = {"CELERY_EMBEDDED": "true", "REFRESH_LIST_PRICES": "true", "LIST_PRICES_URL": server.url}
        with LiveProxy(**wanted) as proxy:
            prices = "SELECT input FROM billing_modelprice WHERE model = 'gpt-4o' AND source = 'refreshed'"
            (row,) = proxy.wait_for_rows(prices, 1, PATIENCE_S)
            assert float(row[0]) == 2
    with LiveProxy(**wanted) as proxy:
        failed = "SELECT detail FROM proxysite_taskrun WHERE outcome = 'failed'"
        (row,) = proxy.wait_for_rows(failed, 1, PATIENCE_S)
        assert row[0].startswith("RefreshError: ConnectError")
        assert proxy.rows(prices) == []
        assert proxy.get("/readyz").json()["tasks"]["refresh_prices"]["state"] == "failed"
        wait_until(lambda: "list prices were not refreshed: ConnectError" in proxy.log, proxy)
        assert "Traceback" not in proxy.log


# With a broker server


@contextlib.contextmanager
def celery_command(proxy: LiveProxy, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of the commands of production with the proxy's settings and log."""
    with proxy.log_path.open("ab") as log:
        command = [sys.executable, "-m", "celery", "-A", "proxysite", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=proxy.environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return url
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", 5672)):
            pytest.skip("no RabbitMQ on this machine")
    return RABBITMQ_URL


def test_with_a_broker_server_worker_and_beat_run_by_themselves(broker_url: str) -> None:
    environment = {"CELERY_BROKER_URL": broker_url, "HEARTBEAT_SECONDS": "1"}
    with instance(**environment) as proxy:
        del proxy.environment["CELERY_EMBEDDED"]
        proxy.start()
        assert celery_pids(proxy) == []
        with celery_command(proxy, "worker", "--concurrency", "1"), celery_command(proxy, "beat"):
            wait_for_beats(proxy, 2)
            assert proxy.get("/readyz").json()["tasks"]["heartbeat"]["state"] == "ok"
        assert "Traceback" not in proxy.log
        assert remove_queue(proxy, broker_url)


def remove_queue(proxy: LiveProxy, broker_url: str) -> int:
    """Return how many queues, or keys, under the proxy's own name there were, and are no more."""
    name = proxy.environment["REDIS_KEY_PREFIX"]
    if broker_url.startswith("redis"):
        with redis.Redis.from_url(broker_url) as client:
            return int(client.delete(*client.keys(f"{name}:celery:*")))
    with Connection(broker_url) as connection, connection.channel() as channel:
        channel.queue_delete(name, if_unused=True)
        channel.exchange_delete(name)
        return 1


def test_with_a_broker_server_it_may_be_embedded_all_the_same(redis_url: str) -> None:
    environment = {"CELERY_BROKER_URL": redis_url, "CELERY_EMBEDDED": "true", "HEARTBEAT_SECONDS": "1"}
    with LiveProxy(**environment) as proxy:
        wait_for_beats(proxy, 2)
        assert len(celery_pids(proxy)) == 1
        assert proxy.stop() == 0
        assert remove_queue(proxy, redis_url)


def test_conversations_are_gone_soon_after_their_time_with_no_broker_server() -> None:
    said = {"apiKey": "sk-sandbox", "sessionId": "soon-forgotten", "content": "Hello!"}
    with LiveProxy(
        SANDBOX_ENABLED="true", CELERY_EMBEDDED="true", SESSION_TTL_SECONDS="10", SESSION_PURGE_SECONDS="1"
    ) as proxy:
        assert proxy.post("/pro/chat/completions", json=said).status_code == 200
        assert proxy.rows("SELECT session_id FROM sessions_api_chatsession") == [("soon-forgotten",)]
        wait_until(lambda: not proxy.rows("SELECT 1 FROM sessions_api_chatsession"), proxy)
        assert proxy.rows("SELECT 1 FROM sessions_api_chatmessage") == []
        runs = proxy.get("/readyz").json()["tasks"]
    assert runs["purge_sessions"]["state"] == "ok"
