"""Usage events given to the ledger, which may be away for as long as it likes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway import segments

logger = logging.getLogger(__name__)

BATCH_EVENTS = 2000
ALARM_AFTER_S = 10.0
_PAUSE_LEAST_S, _PAUSE_MOST_S = 0.5, 10.0
_POISON_FAILURES = 10


class Recorded(Protocol):
    """What the sink says of one call: see `billing.services.RecordResult` and `gateway.segments.Reading`."""

    @property
    def recorded(self) -> int: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def rejected(self) -> int: ...
    @property
    def corrupt(self) -> int: ...
    @property
    def unreadable(self) -> Sequence[bytes]: ...


# Takes lines of the journal as they stand there. What is in them it alone has to know.
Sink = Callable[[bytes], Recorded]


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

    def give(self, lines: bytes) -> Recorded | None:
        """Return what the sink says of the lines that it took, None if it took none: give them again later."""
        if self._unanswered_since is None:
            self._unanswered_since = self._clock()
        try:
            result = self._sink(lines)
        except Exception as exc:  # whatever it is, the events are tried again
            self._failed(exc)
            return None
        # Lines without an event say nothing of a ledger that was away: it was not asked for them.
        if _is_proof(result) or not self._failures:
            self._succeeded()
        self.recorded += result.recorded
        self.duplicates += result.duplicates
        self.rejected += result.rejected
        return result

    def refuses(self, line: bytes, *, others: Callable[[], bytes]) -> bool:
        """Return whether it is the event of this one line that fails, since others are taken and it fails once more.

        Asked in vain of several lines, and until it has failed often: a ledger that comes back just now proves nothing.
        """
        if self._failures < _POISON_FAILURES or line.count(b"\n") != 1:
            return False
        comparison = others()
        if not comparison or (taken := self.give(comparison)) is None or not _is_proof(taken) or self.give(line):
            return False
        self._succeeded()
        event = segments.decode_line(line.rstrip(b"\n"))
        logger.error("the ledger refuses the usage event %s", event.id if event else "?")
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
        self.batch_events = max(1, self.batch_events // 4)


def _is_proof(result: Recorded) -> bool:
    """Return whether the ledger itself has been at work."""
    return bool(result.recorded or result.duplicates)
