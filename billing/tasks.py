"""What runs by the clock. Each may run twice or late: the work behind them takes no harm from it."""

from __future__ import annotations

import logging

from celery import shared_task
from django.conf import settings
from django.utils import timezone

from billing import services
from billing.retention import retention_end

logger = logging.getLogger(__name__)


@shared_task(ignore_result=True)  # type: ignore[no-untyped-call, untyped-decorator]  # celery has no types
def purge_usage() -> int:
    """End the retention of old records; return how many went."""
    removed = services.purge_usage(retention_end(timezone.now().date()))
    logger.info("%d usage records were purged", removed)
    return removed


@shared_task(ignore_result=True)  # type: ignore[no-untyped-call, untyped-decorator]  # celery has no types
def refresh_prices() -> int:
    """Write down list prices that have changed, if the operator wants that; return how many."""
    if not settings.REFRESH_LIST_PRICES:
        return 0
    changed = services.refresh_prices()
    logger.info("%d list prices have changed", changed)
    return changed
