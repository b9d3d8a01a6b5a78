"""Periodic tasks: when each ran, and the schedule in the admin's own look."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import Field, Model, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext, gettext_noop, ngettext
from django.utils.translation import gettext_lazy as _
from django_celery_beat import admin as beat_admin
from django_celery_beat.models import ClockedSchedule, CrontabSchedule, IntervalSchedule, PeriodicTask, SolarSchedule
from unfold.admin import TabularInline
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from billing.admin import audit, confirm
from billing.admin.base import ListAdmin, ReadOnlyAdmin, alarming
from proxysite.models import TaskRun
from proxysite.schedule import DESCRIPTION
from proxysite.task_runs import task_health

_STATES = {
    "ok": _("in time"),
    "late": _("late"),
    "failed": _("failed"),
    "never": _("has not run yet"),
    "off": _("switched off"),
}
_BAD = ("late", "failed")
_CRON_FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")

# What django-celery-beat says in English only.
_SAID_OF_SCHEDULES = (
    gettext_noop("One of clocked, interval, crontab, or solar must be set."),
    gettext_noop("Only one of clocked, interval, crontab, or solar must be set"),
    gettext_noop("clocked must be one off, one_off must set True"),
)
PeriodicTask._meta.get_field("task").verbose_name = _("Task Name")


@admin.register(TaskRun)
class TaskRunAdmin(ReadOnlyAdmin):
    """What Celery's processes have written down."""

    list_display = ("task", "state", "last_succeeded_at", "last_started_at", "duration_ms", "rows", "detail")
    ordering = ("task",)
    fields = (
        "task",
        "outcome",
        "last_started_at",
        "last_finished_at",
        "last_succeeded_at",
        "duration_ms",
        "rows",
        "detail",
    )

    def prepare_rows(self, rows: list[Any]) -> None:
        """Read the states of all these runs, in two queries."""
        states = {health.task: health.state for health in task_health(timezone.now())}
        for run in rows:
            run.state = states.get(run.task, "")

    @admin.display(description=_("state"))
    def state(self, run: Any) -> Any:
        if not hasattr(run, "state"):
            self.prepare_rows([run])
        label = _STATES.get(run.state, "")
        return alarming(label) if run.state in _BAD else label


class _TaskSelect(UnfoldAdminSelectWidget, beat_admin.TaskSelectWidget):
    pass


class _TaskForm(beat_admin.PeriodicTaskForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["regtask"].widget = _TaskSelect()
        self.fields["task"].widget = UnfoldAdminTextInputWidget()
        if self.instance.description == DESCRIPTION:
            self.initial["description"] = gettext(DESCRIPTION)

    def clean_description(self) -> str:
        written: str = self.cleaned_data["description"]
        return DESCRIPTION if written == gettext(DESCRIPTION) else written

    def validate_unique(self) -> None:
        super().validate_unique()
        for error in itertools.chain.from_iterable(self.errors.as_data().values()):
            if error.message in _SAID_OF_SCHEDULES:
                error.message = gettext(error.message)


class _TaskInline(TabularInline):
    model = PeriodicTask
    fields = ("name", "task", "enabled")
    readonly_fields = fields
    extra = 0
    can_delete = False
    show_change_link = True

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


for model in (PeriodicTask, IntervalSchedule, CrontabSchedule, ClockedSchedule, SolarSchedule):
    admin.site.unregister(model)


@admin.register(PeriodicTask)
class PeriodicTaskAdmin(beat_admin.PeriodicTaskAdmin, ListAdmin):
    form = _TaskForm
    # Theirs carries a script in the page, which the admin's content security policy forbids.
    change_form_template = None
    date_hierarchy = None
    list_display = ("name", "task", "enabled", "every", "last_run_at", "total_run_count")
    list_filter = ("enabled",)
    fieldsets = (
        (None, {"fields": ("name", "regtask", "task", "enabled", "description")}),
        (_("Schedule"), {"fields": ("interval", "crontab", "clocked", "start_time", "last_run_at", "one_off")}),
        (_("Arguments"), {"fields": ("args", "kwargs")}),
        (_("Execution"), {"fields": ("expires", "expire_seconds", "queue", "priority")}),
    )
    readonly_fields = ("last_run_at",)
    actions = ("enable", "disable", "run")

    @admin.display(description=_("Schedule"))
    def every(self, task: PeriodicTask) -> str:
        return str(task.scheduler)

    @admin.action(description=_("Enable"), permissions=["change"])
    def enable(self, request: HttpRequest, tasks: QuerySet[PeriodicTask]) -> Any:
        if not confirm.is_confirmed(request):
            explanation = _("From now on these tasks run as they are scheduled:")
            return self._question(request, tasks, "enable", _("Enable tasks"), explanation)
        count = self._turn(request, tasks, is_on=True)
        self.message_user(request, ngettext("%d task enabled.", "%d tasks enabled.", count) % count, messages.SUCCESS)
        return None

    @admin.action(description=_("Disable"), permissions=["change"])
    def disable(self, request: HttpRequest, tasks: QuerySet[PeriodicTask]) -> Any:
        if not confirm.is_confirmed(request):
            explanation = _("From now on these tasks run no more, until they are enabled again:")
            return self._question(request, tasks, "disable", _("Disable tasks"), explanation)
        count = self._turn(request, tasks, is_on=False)
        self.message_user(request, ngettext("%d task disabled.", "%d tasks disabled.", count) % count, messages.SUCCESS)
        return None

    @admin.action(description=_("Run now"), permissions=["change"])
    def run(self, request: HttpRequest, tasks: QuerySet[PeriodicTask]) -> Any:
        if not confirm.is_confirmed(request):
            explanation = _("Each of these tasks runs once now, whatever its schedule says:")
            return self._question(request, tasks, "run", _("Run tasks"), explanation)
        self.celery_app.loader.import_default_modules()
        for task in tasks:
            known = self.celery_app.tasks.get(task.task)
            if known is None:
                self.message_user(request, _("There is no task %(name)s.") % {"name": task.task}, messages.ERROR)
                continue
            known.apply_async(json.loads(task.args), json.loads(task.kwargs), queue=task.queue or None)
            self.log_change(request, task, gettext_noop("run by hand"))
            self.message_user(request, _("%(name)s is started.") % {"name": task.name}, messages.SUCCESS)
        return None

    def _question(self, request: HttpRequest, tasks: QuerySet[PeriodicTask], action: str, title: Any, why: Any) -> Any:
        return confirm.question(self, request, tasks, action=action, title=title, explanation=why)

    def _turn(self, request: HttpRequest, tasks: QuerySet[PeriodicTask], *, is_on: bool) -> int:
        """Return how many were not so already; each of them is written down."""
        turned = list(tasks.exclude(enabled=is_on))
        for task in turned:
            task.enabled = is_on
            task.save(update_fields=["enabled", "last_run_at"])
            self.log_change(request, task, audit.changed(task, enabled=(not is_on, is_on)))
        return len(turned)


@admin.register(IntervalSchedule)
class IntervalScheduleAdmin(ListAdmin):
    inlines = (_TaskInline,)


@admin.register(CrontabSchedule)
class CrontabScheduleAdmin(ListAdmin):
    list_display = (*_CRON_FIELDS, "timezone")
    inlines = (_TaskInline,)

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        if db_field.name in _CRON_FIELDS:
            kwargs["validators"] = [_in_our_words(db_field)]
        return super().formfield_for_dbfield(db_field, request, **kwargs)


@admin.register(ClockedSchedule)
class ClockedScheduleAdmin(ListAdmin):
    inlines = (_TaskInline,)


def _in_our_words(field: Field[Any, Any]) -> Callable[[str], None]:
    """Return a check that fails as those of the field do, which say why in English only."""

    def check(value: str) -> None:
        try:
            field.run_validators(value)
        except ValidationError as exc:
            raise ValidationError(_("%(value)s cannot stand in a crontab here."), params={"value": value}) from exc

    return check
