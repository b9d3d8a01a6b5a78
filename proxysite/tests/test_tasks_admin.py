"""The schedule and its runs as operators see them."""

from __future__ import annotations

import datetime as dt

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask

from proxysite.models import TaskRun
from proxysite.schedule import DESCRIPTION

pytestmark = pytest.mark.django_db


@pytest.fixture
def operator() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("operator"))
    return client


def make_run(task: str, *, age: dt.timedelta, outcome: str = TaskRun.Outcome.SUCCEEDED) -> TaskRun:
    at = timezone.now() - age
    return TaskRun.objects.create(
        task=task, outcome=outcome, last_started_at=at, last_finished_at=at, last_succeeded_at=at, rows=7
    )


def test_a_late_task_is_told_from_one_in_time(operator: Client) -> None:
    make_run("proxysite.tasks.heartbeat", age=dt.timedelta(minutes=10))
    make_run("billing.tasks.purge_usage", age=dt.timedelta(minutes=10))
    page = operator.get("/admin/proxysite/taskrun/", headers={"accept-language": "en"}).content.decode()
    assert page.count(">late<") == 1
    assert "in time" in page


def test_runs_are_only_looked_at(operator: Client) -> None:
    run = make_run("billing.tasks.purge_usage", age=dt.timedelta())
    page = operator.get(f"/admin/proxysite/taskrun/{run.pk}/change/")
    assert page.status_code == 200
    assert 'name="_save"' not in page.content.decode()
    assert operator.get("/admin/proxysite/taskrun/add/").status_code == 403
    assert operator.post(f"/admin/proxysite/taskrun/{run.pk}/delete/", {"post": "yes"}).status_code == 403


@pytest.mark.parametrize("model", ["periodictask", "intervalschedule", "crontabschedule", "clockedschedule"])
def test_the_schedules_pages_look_like_the_others(operator: Client, model: str) -> None:
    interval = IntervalSchedule.objects.create(every=1, period="days")
    PeriodicTask.objects.create(name="mine", task="proxysite.tasks.heartbeat", interval=interval)
    for page in ("", "add/"):
        answer = operator.get(f"/admin/django_celery_beat/{model}/{page}")
        assert answer.status_code == 200
        assert "unfold" in answer.content.decode()


def test_our_own_entries_are_described_in_the_readers_language_and_stay_ours(operator: Client) -> None:
    interval = IntervalSchedule.objects.create(every=1, period="days")
    task = PeriodicTask.objects.create(name="a", task="b", interval=interval, description=DESCRIPTION)
    operator.defaults["HTTP_ACCEPT_LANGUAGE"] = "zh-CN"
    url = "/admin/django_celery_beat/periodictask/"
    page, listed = (operator.get(address).content.decode() for address in (f"{url}{task.pk}/change/", url))
    assert "由 proxysite 创建；每次启动时重设间隔。" in page
    assert "Made by" not in page
    assert "Scheduler" not in listed
    given = {"name": "a", "task": "b", "interval": interval.pk, "args": "[]", "kwargs": "{}", "headers": "{}"}
    operator.post(f"{url}{task.pk}/change/", given | {"description": "由 proxysite 创建；每次启动时重设间隔。"})
    task.refresh_from_db()
    assert (task.enabled, task.description) == (False, DESCRIPTION)


def test_an_operator_switches_a_task_off(operator: Client) -> None:
    interval = IntervalSchedule.objects.create(every=1, period="days")
    task = PeriodicTask.objects.create(name="mine", task="proxysite.tasks.heartbeat", interval=interval)
    page = operator.get(f"/admin/django_celery_beat/periodictask/{task.pk}/change/").content.decode()
    assert "billing.tasks.purge_usage" in page  # offered as a choice
    assert "periodic-task-overrides" not in page  # a script in the page
    given = {"name": "mine", "task": task.task, "interval": interval.pk, "args": "[]", "kwargs": "{}", "headers": "{}"}
    answer = operator.post(f"/admin/django_celery_beat/periodictask/{task.pk}/change/", given)
    assert answer.status_code == 302, answer.content.decode()[-3000:]
    task.refresh_from_db()
    assert task.enabled is False
