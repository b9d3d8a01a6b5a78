"""The schedule and its runs as operators see them."""

from __future__ import annotations

import datetime as dt
import re

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.utils import timezone
from django_celery_beat.models import IntervalSchedule, PeriodicTask

from billing.admin.audit import said_in, values_in
from proxysite.celery import app
from proxysite.models import TaskRun
from proxysite.schedule import DESCRIPTION

pytestmark = pytest.mark.django_db
TASKS = "/admin/django_celery_beat/periodictask/"


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


# Actions


def make_task(name: str, *, task: str = "proxysite.tasks.heartbeat", enabled: bool = True) -> PeriodicTask:
    interval, _ = IntervalSchedule.objects.get_or_create(every=1, period="days")
    return PeriodicTask.objects.create(name=name, task=task, interval=interval, enabled=enabled)


def ask(client: Client, action: str, *tasks: PeriodicTask, **given: str) -> str:
    """Return the page that an action of the list leads to, as readers of English see it."""
    fields = {"action": action, "_selected_action": [task.pk for task in tasks], **given}
    answer = client.post(TASKS, fields, follow=True, headers={"accept-language": "en"})
    assert answer.status_code == 200
    return answer.content.decode()


@pytest.mark.parametrize(("action", "is_on"), [("enable", True), ("disable", False)])
def test_tasks_are_switched_once_it_is_confirmed_and_each_is_written_down(
    operator: Client, action: str, is_on: bool
) -> None:
    tasks = [make_task("mine", enabled=not is_on), make_task("yours", enabled=is_on)]
    assert "Yes, I’m sure" in ask(operator, action, *tasks)
    assert PeriodicTask.objects.filter(enabled=is_on).count() == 1
    assert f"1 task {action}d." in ask(operator, action, *tasks, confirmed="yes")
    assert PeriodicTask.objects.filter(enabled=is_on).count() == 2
    entry = LogEntry.objects.get()
    assert entry.object_id == str(tasks[0].pk)
    assert [value[1:] for value in values_in(entry)] == [("No", "Yes") if is_on else ("Yes", "No")]


def test_a_task_is_run_once_it_is_confirmed_and_that_is_written_down(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.conf, "task_always_eager", True)
    tasks = [make_task("mine"), make_task("lost", task="nothing.has.this.name")]
    assert "Yes, I’m sure" in ask(operator, "run", *tasks)
    assert not TaskRun.objects.exists()
    page = ask(operator, "run", *tasks, confirmed="yes")
    assert "mine is started." in page
    assert "There is no task nothing.has.this.name." in page
    assert TaskRun.objects.get().outcome == TaskRun.Outcome.SUCCEEDED
    assert [(entry.object_repr, said_in(entry)) for entry in LogEntry.objects.all()] == [(str(tasks[0]), "run by hand")]


@pytest.mark.parametrize(
    "action", ["enable", "disable", "run", "enable_tasks", "disable_tasks", "toggle_tasks", "run_tasks"]
)
def test_who_may_only_look_at_tasks_can_do_nothing_with_them(action: str) -> None:
    user = User.objects.create_user("looker", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_periodictask"))
    client = Client()
    client.force_login(user)
    task = make_task("mine", enabled=not action.startswith("enable"))
    before = task.enabled
    ask(client, action, task, confirmed="yes")
    task.refresh_from_db()
    assert task.enabled is before
    assert not LogEntry.objects.exists()


def test_what_makes_no_schedule_is_said_in_the_readers_language(operator: Client) -> None:
    operator.defaults["HTTP_ACCEPT_LANGUAGE"] = "zh-CN"
    given = {"name": "mine", "task": "proxysite.tasks.heartbeat", "args": "[]", "kwargs": "{}", "headers": "{}"}
    page = operator.post(f"{TASKS}add/", given).content.decode()
    assert "必须选择一个间隔、crontab 或定时时间。" in page
    cron = {"minute": "x", "hour": "*", "day_of_month": "*", "month_of_year": "*", "day_of_week": "*"}
    page = operator.post("/admin/django_celery_beat/crontabschedule/add/", cron | {"timezone": "UTC"}).content.decode()
    assert "x 不能用在 crontab 的此处。" in page
    assert re.findall("No enumeration|Task Name|Cron Months|Cron Days", page) == []
