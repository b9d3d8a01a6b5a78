"""What gateway workers say of themselves, for pages that show all of them."""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _


class WorkerState(models.Model):
    """The last word of one gateway worker, on whatever machine; older than a few seconds, it is of a dead one."""

    worker = models.CharField(_("worker"), max_length=100, primary_key=True)
    seen_at = models.DateTimeField(_("seen"))
    open_streams = models.IntegerField(_("open streams"))
    journal_bytes = models.BigIntegerField(_("bytes in the journal"))
    journal_age_s = models.FloatField(_("age of its oldest event in seconds"))
    journal_alarm = models.CharField(_("what is wrong with the journal"), max_length=300, blank=True)

    limits_away = models.BooleanField(_("cannot count limits"), default=False, db_default=False)

    class Meta:
        verbose_name = _("gateway worker")
        verbose_name_plural = _("gateway workers")

    def __str__(self) -> str:
        return self.worker
