"""Periodic tasks: when each ran, and the schedule in the admin's own look."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django.utils import timezone
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _
from django_celery_beat import admin as beat_admin
from django_celery_beat.models import ClockedSchedule, CrontabSchedule, IntervalSchedule, PeriodicTask, SolarSchedule
from unfold.admin import TabularInline
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

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

    @admin.display(description=_("Schedule"))
    def every(self, task: PeriodicTask) -> str:
        return str(task.scheduler)


@admin.register(IntervalSchedule)
class IntervalScheduleAdmin(ListAdmin):
    inlines = (_TaskInline,)


@admin.register(CrontabSchedule)
class CrontabScheduleAdmin(ListAdmin):
    list_display = ("__str__", "human_readable")
    inlines = (_TaskInline,)


@admin.register(ClockedSchedule)
class ClockedScheduleAdmin(ListAdmin):
    inlines = (_TaskInline,)
