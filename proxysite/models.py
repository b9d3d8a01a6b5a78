"""What the instance knows of itself."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _

DETAIL_MAX_CHARS = 300


class TaskRun(models.Model):
    """The last run of a periodic task. `rows` is what the task says that it changed; None if it counts nothing."""

    class Outcome(models.TextChoices):
        RUNNING = "running", _("running")
        SUCCEEDED = "succeeded", _("succeeded")
        FAILED = "failed", _("failed")

    task = models.CharField(_("task"), max_length=200, unique=True)
    outcome = models.CharField(_("outcome"), max_length=16, choices=Outcome, default=Outcome.RUNNING)
    last_started_at = models.DateTimeField(_("last started"))
    last_finished_at = models.DateTimeField(_("last finished"), null=True)
    last_succeeded_at = models.DateTimeField(_("last succeeded"), null=True)
    duration_ms = models.BigIntegerField(_("duration in ms"), null=True)
    rows = models.BigIntegerField(_("rows"), null=True)
    detail = models.CharField(_("detail"), max_length=DETAIL_MAX_CHARS, blank=True)

    class Meta:
        verbose_name = _("task run")
        verbose_name_plural = _("task runs")

    def __str__(self) -> str:
        return self.task
