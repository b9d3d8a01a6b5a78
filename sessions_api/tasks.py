"""What runs by the clock. It may run twice or late: the work behind it takes no harm from it."""

from __future__ import annotations

import logging

from celery import shared_task

from sessions_api import services

logger = logging.getLogger(__name__)


@shared_task(ignore_result=True)
def purge_sessions() -> int:
    """Remove the conversations that have expired; return how many that were."""
    removed = services.purge_expired_sessions()
    if removed:
        logger.info("%d conversations were purged", removed)
    return removed
