"""When the parts of an answer arrived, beside when they were sent."""

from __future__ import annotations

import time

# Of the time over which it was sent, an answer that arrives in less is held back.
_LEAST_SHARE = 0.6
# What arrives within this came together.
_MOMENT_S = 0.05
_MANY = 10


class Arrivals:
    """Counts what arrives, and when; begin it before the question is asked."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._times_s: list[float] = []

    def add(self, count: int) -> None:
        """Note that so many arrived now."""
        self._times_s += [time.monotonic()] * count

    @property
    def count(self) -> int:
        return len(self._times_s)

    @property
    def spread_s(self) -> float:
        return self._times_s[-1] - self._times_s[0] if self._times_s else 0.0

    @property
    def moments(self) -> int:
        """At how many different moments something arrived."""
        gaps = zip(self._times_s, self._times_s[1:], strict=False)
        return sum(after - before > _MOMENT_S for before, after in gaps) + bool(self._times_s)

    def trouble(self, *, sent_s: float | None, what: str, count: int | None = None) -> str:
        """Return how what was sent over `sent_s` was held back, "" if it was not.

        `sent_s` None is unknown: then only what came all at once, after a wait, is trouble. `count` is how many were
        sent, where fewer may arrive since some were joined.
        """
        sent = count or self.count
        if not sent:
            return f"no {what} arrived"
        if sent_s is None:
            waited_s = self._times_s[-1] - self._began_s
            is_held = sent >= _MANY and self.spread_s < _MOMENT_S and waited_s > 10 * _MOMENT_S
            return f"{sent} {what} arrived all at once, after {waited_s:.1f} s" if is_held else ""
        if self.spread_s < sent_s * _LEAST_SHARE:
            return f"{sent} {what} that were sent over {sent_s:.1f} s arrived within {self.spread_s:.1f} s"
        if self.moments < sent * _LEAST_SHARE:
            return f"{sent} {what} that were sent one by one arrived at {self.moments} moments"
        return ""
