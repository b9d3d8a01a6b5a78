"""What runs by the clock. Each may run twice or late: the work behind them takes no harm from it."""

from __future__ import annotations

import logging

from celery import shared_task
from django.conf import settings
from django.utils import timezone

from billing import services
from billing.retention import is_purged, retention_end

logger = logging.getLogger(__name__)

# For so long a purge keeps a worker of one process from everything else that waits.
_SLICE_S = 20.0
_CONTINUE_WITHIN_S = 600


@shared_task
def purge_usage() -> int:
    """End the retention of old records for a while, and come again if some are left; return how many went."""
    before = retention_end(timezone.now().date())
    removed = services.purge_usage(before, for_at_most_s=_SLICE_S)
    if removed:
        logger.info("%d usage records were purged", removed)
    if not is_purged(before):
        purge_usage.apply_async(expires=_CONTINUE_WITHIN_S)
    return removed


@shared_task(throws=(services.RefreshError,))
def refresh_prices() -> int:
    """Write down list prices that have changed, if the operator wants that; return how many."""
    if not settings.REFRESH_LIST_PRICES:
        return 0
    try:
        changed = services.refresh_prices()
    except services.RefreshError as exc:
        logger.warning("list prices were not refreshed: %s", exc)
        raise
    logger.info("%d list prices have changed", changed)
    return changed
