"""What one worker has done since it started: plain numbers, added to once for each request. Pure."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from http import HTTPStatus
from operator import attrgetter

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

# Requests that have ended and are yet to be counted: the larger, the less each costs.
_MOST_ENDED = 256

_KNOWN_STATUSES = {status.value for status in HTTPStatus}


class _Times:
    """How many were at most as long as each edge and longer than the one before, and their sum."""

    __slots__ = ("_edges_ms", "counts", "total_ms")

    def __init__(self, edges_ms: tuple[float, ...]) -> None:
        self._edges_ms = edges_ms
        self.counts = [0] * (len(edges_ms) + 1)
        self.total_ms = 0.0

    def add(self, times_ms: list[float]) -> None:
        times_ms.sort()
        below = 0
        for at, edge_ms in enumerate(self._edges_ms):
            up_to = bisect_right(times_ms, edge_ms)
            self.counts[at] += up_to - below
            below = up_to
        self.counts[-1] += len(times_ms) - below
        self.total_ms += sum(times_ms)

    def values(self) -> list[float]:
        return [*self.counts, self.total_ms]


class _AtEndpoint:
    __slots__ = ("duration", "first_byte", "request_bytes", "response_bytes")

    def __init__(self) -> None:
        self.first_byte = _Times(WAIT_EDGES_MS)
        self.duration = _Times(WAIT_EDGES_MS)
        self.request_bytes = self.response_bytes = 0


_ending_of = attrgetter("endpoint", "outcome", "status")


class Tally:
    """Added to by the event loop; any thread may read it meanwhile, and may see some requests in part."""

    def __init__(self) -> None:
        # Counted some hundreds at a time: one by one, each would cost ten times as much.
        self._ended: deque[tuple[UsageEvent, bool]] = deque()
        self._counting = threading.Lock()
        self._endings: dict[tuple[str, str, int], int] = {}
        self._endpoints: dict[str, _AtEndpoint] = {}
        self._added = _Times(ADDED_EDGES_MS)
        self._failures: dict[str, int] = {}
        self._refusals: dict[tuple[str, str], int] = {}
        self._uncounted = 0

    def finished(self, event: UsageEvent, *, has_begun: bool) -> None:
        """Count a request that has ended, and whether an answer to it had begun."""
        ended = self._ended
        ended.append((event, has_begun))
        if len(ended) >= _MOST_ENDED:
            self._count()

    def failed(self, code: str) -> None:
        """Count an error of the gateway's own, by the code that the client was told."""
        self._failures[code] = self._failures.get(code, 0) + 1

    def refused(self, scope: str, reason: str) -> None:
        """Count a request that a limit has stopped: a key's or an address's, and which one."""
        self._refusals[scope, reason] = self._refusals.get((scope, reason), 0) + 1

    def uncounted(self) -> None:
        """Count a request whose limits nobody could look at."""
        self._uncounted += 1

    def _count(self) -> None:
        """Count what has ended since the last time."""
        with self._counting:
            ended = self._ended
            by_endpoint: dict[str, list[tuple[UsageEvent, bool]]] = {}
            for _ in range(len(ended)):
                pair = ended.popleft()
                by_endpoint.setdefault(pair[0].endpoint, []).append(pair)
            for endpoint, pairs in by_endpoint.items():
                at = self._endpoints.get(endpoint)
                if at is None:
                    at = self._endpoints[endpoint] = _AtEndpoint()
                self._count_at(at, pairs)

    def _count_at(self, at: _AtEndpoint, pairs: list[tuple[UsageEvent, bool]]) -> None:
        events = [event for event, _ in pairs]
        for ending, requests in Counter(map(_ending_of, events)).items():
            endpoint, outcome, status = ending
            if status not in _KNOWN_STATUSES:
                # An upstream may make up as many as it likes: those that nobody knows count together.
                ending = endpoint, outcome, status // 100
            self._endings[ending] = self._endings.get(ending, 0) + requests
        at.request_bytes += sum([event.request_bytes for event in events])
        at.response_bytes += sum([event.response_bytes for event in events])
        at.duration.add([event.duration_ms for event in events])
        at.first_byte.add([event.first_byte_ms for event, has_begun in pairs if has_begun])
        self._added.add([event.proxy_ms for event in events if event.proxy_ms])

    def counters(self) -> dict[Key, float]:
        """Return everything that only grows, under metric and labels."""
        self._count()
        found: dict[Key, float] = {}
        for (endpoint, outcome, status), requests in list(self._endings.items()):
            _add(found, ("requests", endpoint, outcome, status_class(status)), requests)
            if outcome in ("completed", "client_closed"):
                shown = str(status) if status in _KNOWN_STATUSES else status_class(status)
                _add(found, ("upstream_answers", shown), requests)
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
        self._count()
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
