"""What one worker has done since it started: plain numbers, added to once for each request. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from http import HTTPStatus

from billing.events import UsageEvent

# A metric's name, then the values of its labels: all of fixed sets, never text of a client's.
Key = tuple[str, ...]

# Upper edges in milliseconds, both of what an answer may take and of what nobody should notice.
WAIT_EDGES_MS = (50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 20_000, 30_000, 60_000, 120_000, 300_000, 600_000)
ADDED_EDGES_MS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1_000.0)
EDGES_MS: dict[str, tuple[float, ...]] = {
    "first_byte_seconds": WAIT_EDGES_MS,
    "request_duration_seconds": WAIT_EDGES_MS,
    "added_latency_seconds": ADDED_EDGES_MS,
}

_KNOWN_STATUSES = {status.value for status in HTTPStatus}


class _Times:
    """How many were at most as long as each edge and longer than the one before, and their sum."""

    __slots__ = ("counts", "total_ms")

    def __init__(self, edges_ms: tuple[float, ...]) -> None:
        self.counts = [0] * (len(edges_ms) + 1)
        self.total_ms = 0.0

    def values(self) -> list[float]:
        return [*self.counts, self.total_ms]


class _AtEndpoint:
    __slots__ = ("duration", "first_byte", "request_bytes", "response_bytes")

    def __init__(self) -> None:
        self.first_byte = _Times(WAIT_EDGES_MS)
        self.duration = _Times(WAIT_EDGES_MS)
        self.request_bytes = self.response_bytes = 0


class _Ending:
    """Requests to one endpoint that ended in one way."""

    __slots__ = ("at", "requests")

    def __init__(self, at: _AtEndpoint) -> None:
        self.at = at
        self.requests = 0


class Tally:
    """Added to by the event loop; any thread may read it meanwhile, and then sees a request in part at worst."""

    def __init__(self) -> None:
        self._endings: dict[tuple[str, str, int], _Ending] = {}
        self._endpoints: dict[str, _AtEndpoint] = {}
        self._added = _Times(ADDED_EDGES_MS)
        self._failures: dict[str, int] = {}
        self._refusals: dict[tuple[str, str], int] = {}
        self._uncounted = 0

    def finished(self, event: UsageEvent, *, has_begun: bool) -> None:
        """Count a request that has ended, and whether an answer to it had begun.

        Costs each request about a microsecond: mind that.
        """
        ending = self._endings.get((event.endpoint, event.outcome, event.status))
        if ending is None:
            ending = self._new_ending(event)
        ending.requests += 1
        at = ending.at
        at.request_bytes += event.request_bytes
        at.response_bytes += event.response_bytes
        ms: float = event.duration_ms
        times = at.duration
        times.counts[bisect_left(WAIT_EDGES_MS, ms)] += 1
        times.total_ms += ms
        if has_begun:
            ms = event.first_byte_ms
            times = at.first_byte
            times.counts[bisect_left(WAIT_EDGES_MS, ms)] += 1
            times.total_ms += ms
        ms = event.proxy_ms
        if ms:
            times = self._added
            times.counts[bisect_left(ADDED_EDGES_MS, ms)] += 1
            times.total_ms += ms

    def failed(self, code: str) -> None:
        """Count an error of the gateway's own, by the code that the client was told."""
        self._failures[code] = self._failures.get(code, 0) + 1

    def refused(self, scope: str, reason: str) -> None:
        """Count a request that a limit has stopped: a key's or an address's, and which one."""
        self._refusals[scope, reason] = self._refusals.get((scope, reason), 0) + 1

    def uncounted(self) -> None:
        """Count a request whose limits nobody could look at."""
        self._uncounted += 1

    def _new_ending(self, event: UsageEvent) -> _Ending:
        at = self._endpoints.get(event.endpoint)
        if at is None:
            at = self._endpoints[event.endpoint] = _AtEndpoint()
        # An upstream may make up as many statuses as it likes: those that nobody knows count together.
        status = event.status if event.status in _KNOWN_STATUSES else event.status // 100
        return self._endings.setdefault((event.endpoint, event.outcome, status), _Ending(at))

    def counters(self) -> dict[Key, float]:
        """Return everything that only grows, under metric and labels."""
        found: dict[Key, float] = {}
        for (endpoint, outcome, status), ending in list(self._endings.items()):
            _add(found, ("requests", endpoint, outcome, status_class(status)), ending.requests)
            if outcome in ("completed", "client_closed"):
                shown = str(status) if status in _KNOWN_STATUSES else status_class(status)
                _add(found, ("upstream_answers", shown), ending.requests)
        for endpoint, at in list(self._endpoints.items()):
            found["request_bytes", endpoint] = at.request_bytes
            found["response_bytes", endpoint] = at.response_bytes
        for code, count in list(self._failures.items()):
            found["errors", code] = count
        for (scope, reason), count in list(self._refusals.items()):
            found["limit_refusals", scope, reason] = count
        found["limit_uncounted_requests",] = self._uncounted
        return found

    def histograms(self) -> dict[Key, list[float]]:
        """Return under metric and labels: a count for each bucket of EDGES_MS and one above, then the sum in ms."""
        return {key: times.values() for key, times in self._all_times()}

    def _all_times(self) -> Iterator[tuple[Key, _Times]]:
        yield ("added_latency_seconds",), self._added
        for endpoint, at in list(self._endpoints.items()):
            yield ("first_byte_seconds", endpoint), at.first_byte
            yield ("request_duration_seconds", endpoint), at.duration


def status_class(status: int) -> str:
    """Return "2xx" and the like, for 2 as for 200; "none" where the client was told no status."""
    first = status if status < 10 else status // 100
    return f"{first}xx" if 1 <= first <= 5 else "none"


def _add(found: dict[Key, float], key: Key, count: float) -> None:
    found[key] = found.get(key, 0) + count
