"""What runs by the clock for the whole instance."""

from __future__ import annotations

from celery import shared_task


@shared_task
def heartbeat() -> None:
    """Do nothing: that it ran, which `TaskRun` shows, is the sign that beat, broker and worker live."""
