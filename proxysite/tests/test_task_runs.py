"""What is written down of periodic work, and when it is called late; no process of Celery's is needed for that."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import time
from pathlib import Path

import pytest
from django.utils import timezone
from django_celery_beat.models import PeriodicTask
from pytest_django import Settings

from billing.tasks import purge_usage, refresh_prices
from gateway.tests.live import ROOT
from proxysite import file_broker
from proxysite.celery import app
from proxysite.models import TaskRun
from proxysite.schedule import DESCRIPTION
from proxysite.scheduler import Scheduler
from proxysite.task_runs import task_health
from proxysite.tasks import heartbeat

pytestmark = pytest.mark.django_db
NOW = dt.datetime(2026, 11, 20, 12, 0, tzinfo=dt.UTC)
# beat commits, and closes connections that are old.
by_beat = pytest.mark.django_db(transaction=True)
HEARTBEAT = "proxysite.tasks.heartbeat"


# Runs


def test_a_run_is_written_down_with_what_it_did() -> None:
    before = timezone.now()
    purge_usage.apply()
    run = TaskRun.objects.get()
    assert (run.task, run.outcome, run.rows) == ("billing.tasks.purge_usage", "succeeded", 0)
    assert run.last_finished_at is not None
    assert before <= run.last_started_at <= run.last_finished_at <= timezone.now()
    assert run.last_succeeded_at == run.last_finished_at
    assert run.duration_ms is not None


def test_a_task_that_counts_nothing_has_no_rows() -> None:
    heartbeat.apply()
    assert TaskRun.objects.get().rows is None


def test_a_failure_keeps_the_last_success_and_says_why(settings: Settings) -> None:
    refresh_prices.apply()
    succeeded_at = TaskRun.objects.get().last_succeeded_at
    assert succeeded_at is not None
    settings.REFRESH_LIST_PRICES = True
    settings.LIST_PRICES_URL = "http://127.0.0.1:9/"
    refresh_prices.apply()
    run = TaskRun.objects.get()
    assert (run.outcome, run.last_succeeded_at, run.rows) == ("failed", succeeded_at, None)
    assert run.detail.startswith("RefreshError: ConnectError: ")
    settings.REFRESH_LIST_PRICES = False
    refresh_prices.apply()
    run = TaskRun.objects.get()
    assert (run.outcome, run.detail) == ("succeeded", "")


# Health


def state_of(name: str) -> str:
    return next(health.state for health in task_health(NOW) if health.name == name)


def make_run(*, age_s: float, outcome: str = "succeeded") -> None:
    at = NOW - dt.timedelta(seconds=age_s)
    TaskRun.objects.create(task=HEARTBEAT, outcome=outcome, last_started_at=NOW, last_succeeded_at=at)


@pytest.mark.parametrize(
    ("age_s", "outcome", "state"),
    [
        (0, "succeeded", "ok"),
        (180, "succeeded", "ok"),
        (181, "succeeded", "late"),
        (181, "running", "late"),
        (60, "running", "ok"),
        (60, "failed", "failed"),
        (181, "failed", "late"),
    ],
)
def test_a_task_is_late_after_two_intervals_and_a_minute(age_s: int, outcome: str, state: str) -> None:
    make_run(age_s=age_s, outcome=outcome)
    assert state_of("heartbeat") == state


def test_a_task_that_has_never_succeeded_says_so() -> None:
    assert state_of("heartbeat") == "never"
    TaskRun.objects.create(task=HEARTBEAT, last_started_at=NOW)
    assert state_of("heartbeat") == "never"
    TaskRun.objects.update(outcome="failed")
    assert state_of("heartbeat") == "failed"


@by_beat
def test_a_task_that_is_switched_off_is_not_late() -> None:
    make_run(age_s=9999)
    Scheduler(app=app)
    PeriodicTask.objects.filter(name="heartbeat").update(enabled=False)
    assert state_of("heartbeat") == "off"


def test_prices_are_on_the_schedule_only_if_they_are_wanted(settings: Settings) -> None:
    assert "refresh_prices" not in {health.name for health in task_health(NOW)}
    settings.REFRESH_LIST_PRICES = True
    assert state_of("refresh_prices") == "never"


# The schedule in the database


@by_beat
def test_each_task_is_due_at_once_on_its_first_start_and_then_by_its_interval() -> None:
    first = Scheduler(app=app)
    assert {"heartbeat", "purge_usage"} <= first.schedule.keys()
    assert all(entry.is_due().is_due for entry in first.schedule.values())
    for entry in list(first.schedule.values()):
        first.reserve(entry)
    first.sync()
    assert not any(entry.is_due().is_due for entry in Scheduler(app=app).schedule.values())


@by_beat
def test_a_start_brings_the_schedule_up_to_date_and_keeps_what_operators_decided(settings: Settings) -> None:
    settings.REFRESH_LIST_PRICES = True
    Scheduler(app=app)
    assert PeriodicTask.objects.get(name="refresh_prices").enabled
    PeriodicTask.objects.filter(name="heartbeat").update(enabled=False)
    interval = PeriodicTask.objects.get(name="heartbeat").interval
    PeriodicTask.objects.create(name="mine", task=HEARTBEAT, interval=interval)
    settings.REFRESH_LIST_PRICES = False
    settings.HEARTBEAT_SECONDS = 7
    schedule = Scheduler(app=app).schedule
    assert "heartbeat" not in schedule
    assert set(PeriodicTask.objects.values_list("name", flat=True)) >= {"heartbeat", "purge_usage", "mine"}
    assert not PeriodicTask.objects.filter(name="refresh_prices").exists()
    changed = PeriodicTask.objects.get(name="heartbeat")
    assert (changed.enabled, changed.interval.every, changed.description) == (False, 7, DESCRIPTION)


@by_beat
def test_a_clock_that_is_set_back_stops_no_task_for_longer_than_its_interval(settings: Settings) -> None:
    """Each run is noted, and each next one reckoned, by a clock that is an hour ahead; then beat looks again."""
    settings.HEARTBEAT_SECONDS = 5
    an_hour = dt.timedelta(hours=1)
    PeriodicTask.objects.all().delete()
    Scheduler(app=app)
    PeriodicTask.objects.update(last_run_at=timezone.now() + an_hour)
    restarted = Scheduler(app=app)
    assert all(entry.is_due().next <= entry.schedule.seconds for entry in restarted.schedule.values())

    running = Scheduler(app=app)
    running.populate_heap()
    running._heap = [event._replace(time=event.time + 3600) for event in running._heap]
    running._ticked_at = time.time() + 3600
    running.old_schedulers = running.schedule
    assert running.tick() <= 5
    assert min(event.time for event in running._heap) <= time.time() + 6


@by_beat
def test_every_message_expires() -> None:
    Scheduler(app=app)
    for task in PeriodicTask.objects.filter(description=DESCRIPTION):
        assert task.expire_seconds is not None
        assert 10 <= task.expire_seconds <= 3600


# The folder of messages


def test_only_messages_that_nobody_took_in_time_are_removed(settings: Settings, tmp_path: Path) -> None:
    settings.CELERY_DIR = tmp_path
    options = {"data_folder_in": str(tmp_path / "messages"), "control_folder": str(tmp_path / "control")}
    settings.CELERY_BROKER_TRANSPORT_OPTIONS = options
    file_broker.make_folders()
    waiting, killed = tmp_path / "messages" / "1_a.proxysite.msg", tmp_path / "taken" / "0_b.proxysite.msg"
    kept = tmp_path / "control" / "proxysite.exchange"
    for path in (waiting, killed, kept):
        path.write_text("{}")
    assert file_broker.clear_stale() == 0
    assert file_broker.clear_stale(now=time.time() + 16 * 60) == 2
    assert [path.name for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [kept.name]


# The time limit


def test_a_task_that_goes_on_for_too_long_ends_the_process() -> None:
    script = (
        "import threading; from proxysite.celery_process import _CurrentTask;"
        "_CurrentTask(time_limit_s=0.1).begin(); threading.Event().wait(120)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_a_task_that_ends_in_time_does_not() -> None:
    script = (
        "import threading; from proxysite.celery_process import _CurrentTask;"
        "current = _CurrentTask(time_limit_s=0.1); current.begin(); current.end(); threading.Event().wait(0.5)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 0
