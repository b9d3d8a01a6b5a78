"""What runs when: entries for Celery's beat, by their names in the admin and in /readyz."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings
from django.utils.translation import gettext_noop

# How an entry of ours is told from one that an operator has added; readers of the admin see its translation.
DESCRIPTION = gettext_noop("Made by proxysite; its interval is set anew at every start.")
_DAY_SECONDS = 24 * 3600
_PRICES_SECONDS = 6 * 3600


@dataclass(frozen=True, slots=True)
class Entry:
    """A task and the seconds between two runs of it."""

    task: str
    every_s: int

    @property
    def expires_s(self) -> int:
        """A message that has waited for longer is dropped: the next one is there already, or soon."""
        return max(self.every_s, 10) if self.every_s < 3600 else 3600


def entries() -> dict[str, Entry]:
    """Return what this instance is to run. An entry that is here no more is removed when beat starts."""
    wanted = {
        "heartbeat": Entry("proxysite.tasks.heartbeat", settings.HEARTBEAT_SECONDS),
        "purge_usage": Entry("billing.tasks.purge_usage", _DAY_SECONDS),
        "purge_sessions": Entry("sessions_api.tasks.purge_sessions", settings.SESSION_PURGE_SECONDS),
    }
    if settings.REFRESH_LIST_PRICES:
        wanted["refresh_prices"] = Entry("billing.tasks.refresh_prices", _PRICES_SECONDS)
    return wanted
