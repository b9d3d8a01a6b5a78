"""What a reader of an answer has found in it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.usage.sample import OutputSample


class Reading(msgspec.Struct, frozen=True):
    """What the upstream said of one answer.

    `usage` is None where none was reported; zeros are a report. `is_complete`: the upstream came to its own end,
    which is a closed object, or `[DONE]` or the last event that the route has; a complete answer may be of a
    failure. `stored_usage` is that of an object which was only looked at, or made to run later, `object_id`: it is
    not this request's, and is said again each time; whoever records it, records it once by that id, so it is None
    until the object has come to its end. `in_background`: the object is a response or a run that goes on by itself,
    whose usage nobody else reports. Other objects have no id here. `has_failed`: the answer says that it is a failure.
    """

    usage: Usage | None = None
    model: str = ""
    service_tier: str = ""
    is_complete: bool = False
    object_id: str = ""
    stored_usage: Usage | None = None
    in_background: bool = False
    has_failed: bool = False


# Of which a usage may be met again under the same id.
IDENTIFIED = (Meter.BATCH, Meter.STORED, Meter.RESPONSES, Meter.RUNS)
# An assistant's run: it goes on by itself, unless it is streamed, and then can be looked at all the same.
RUN = "thread.run"


class UsageReader(Protocol):
    """Reads usage from a copy of one answer, which may be cut anywhere; never raises."""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body, decoded; chunks may have any borders."""

    def result(self, *, is_whole: bool = True) -> Reading:
        """Return what has been found. `is_whole`: the answer ended where the upstream ended it.

        Nothing is fed afterwards; may be called again.
        """

    def output_sample(self) -> OutputSample:
        """Return the beginning of what the model wrote, empty once usage has been seen. Costs milliseconds."""
