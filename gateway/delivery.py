"""Usage events given to the ledger, which may be away for as long as it likes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from billing.events import UsageEvent

logger = logging.getLogger(__name__)

BATCH_EVENTS = 500
ALARM_AFTER_S = 10.0
_PAUSE_LEAST_S, _PAUSE_MOST_S = 0.5, 10.0
_POISON_FAILURES = 10


class Recorded(Protocol):
    """What the sink says of one call."""

    @property
    def recorded(self) -> int: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def rejected(self) -> int: ...


Sink = Callable[[Sequence[UsageEvent]], Recorded]


class Delivery:
    """A sink, and how it has been doing; for one thread.

    After a failure it asks for patience, and for fewer events at once: so a single event that cannot be recorded
    ends up alone.
    """

    def __init__(self, sink: Sink, *, clock: Callable[[], float]) -> None:
        self.recorded = self.duplicates = self.rejected = 0
        self.batch_events = BATCH_EVENTS
        self._sink = sink
        self._clock = clock
        self._failures = 0
        self._error = ""
        self._retry_at = 0.0
        self._unanswered_since: float | None = None

    @property
    def is_failing(self) -> bool:
        return self._failures > 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to try, again or at all."""
        return not self._failures or self._clock() >= self._retry_at

    def give(self, events: Sequence[UsageEvent]) -> bool:
        """Return whether the sink took the events; otherwise give them again later."""
        if self._unanswered_since is None:
            self._unanswered_since = self._clock()
        try:
            result = self._sink(events)
        except Exception as exc:  # whatever it is, the events are tried again
            self._failed(exc)
            return False
        self._succeeded()
        self.recorded += result.recorded
        self.duplicates += result.duplicates
        self.rejected += result.rejected
        return True

    def refuses(self, events: Sequence[UsageEvent], *, others: Callable[[], Sequence[UsageEvent]]) -> bool:
        """Return whether it is this one event that fails, since others are taken and it fails once more.

        Asked in vain until the event has failed often: a ledger that comes back just now proves nothing.
        """
        if len(events) != 1 or self._failures < _POISON_FAILURES:
            return False
        comparison = others()
        if not comparison or not self.give(comparison) or self.give(events):
            return False
        self._succeeded()
        logger.error("the ledger refuses the usage event %s", events[0].id)
        return True

    def alarm(self) -> str:
        """Return what is wrong once it has lasted, else ""."""
        since = self._unanswered_since
        if since is None or self._clock() - since < ALARM_AFTER_S:
            return ""
        return f"the ledger takes no events ({self._error or 'no answer'})"

    def _succeeded(self) -> None:
        self._failures = 0
        self._error = ""
        self._unanswered_since = None
        self.batch_events = min(BATCH_EVENTS, self.batch_events * 2)

    def _failed(self, exc: Exception) -> None:
        if not self._failures:
            logger.warning("the ledger took no events; they wait", exc_info=exc)
        self._error = type(exc).__name__
        self._retry_at = self._clock() + min(_PAUSE_MOST_S, _PAUSE_LEAST_S * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self.batch_events = max(1, self.batch_events // 2)
