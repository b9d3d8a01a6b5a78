"""/metrics: what all workers of this instance have counted, in Prometheus's formats, for those who may see it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
from django.conf import settings
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from billing.fields import UNITS_PER_USD
from billing.rollups import TOKENS
from gateway import headers as wire
from gateway import segments, snapshots
from gateway.asgi import Receive, Scope, Send
from gateway.journal import Journal
from gateway.limiter import Limiter
from gateway.relay import Relay
from gateway.snapshots import Snapshot, SnapshotFile
from gateway.tally import EDGES_MS, Key
from gateway.transport import PooledTransport

logger = logging.getLogger("proxysite.metrics")

Value = TypeVar("Value")

_PREFIX = "proxysite_"
_WRITE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a metric says, and the names of its labels."""

    help: str
    labels: tuple[str, ...] = ()


_COUNTERS = {
    "requests": _Meaning("Requests to /v1 that have ended.", ("endpoint", "outcome", "status")),
    "request_bytes": _Meaning("Bytes of requests' bodies.", ("endpoint",)),
    "response_bytes": _Meaning("Bytes of answers' bodies, as the upstream sent them.", ("endpoint",)),
    "upstream_answers": _Meaning("Answers of the upstream, by its status.", ("status",)),
    "upstream_connections_opened": _Meaning("Connections opened to the upstream."),
    "errors": _Meaning("Errors of the gateway's own, by the code that the client was told.", ("code",)),
    "limit_refusals": _Meaning(
        "Requests that a limit of a key or an address has stopped; reason=cut: streams.", ("scope", "reason")
    ),
    "limit_uncounted_requests": _Meaning("Requests whose limits could not be counted, since Redis was away."),
    "tokens": _Meaning("Tokens in the ledger; no token is in two kinds.", ("kind",)),
    "reasoning_tokens": _Meaning("The part of kind=output that was thinking."),
    "spend_usd": _Meaning("Cost of what the ledger has recorded, in USD; what is re-priced later is not in it."),
    "unpriced_requests": _Meaning("Requests that the ledger has recorded without knowing their price."),
    "journal_events": _Meaning("Usage events by what became of them.", ("result",)),
    "cpu_seconds": _Meaning("CPU time of the workers."),
}
_HISTOGRAMS = {
    "first_byte_seconds": _Meaning("From a request's head until the upstream's answer began.", ("endpoint",)),
    "request_duration_seconds": _Meaning("From a request's head until its answer ended.", ("endpoint",)),
    "added_latency_seconds": _Meaning("From a request's head until it went upstream; its body arrives meanwhile."),
}
_GAUGES = {
    "workers": _Meaning("Workers that live."),
    "open_streams": _Meaning("Requests and WebSockets in progress."),
    "open_streams_limit": _Meaning("How many there may be: MAX_OPEN_STREAMS for each worker."),
    "limits_away": _Meaning("Workers that cannot count limits now: their breaker for Redis is open."),
    "upstream_connections": _Meaning("Connections to the upstream.", ("state",)),
    "journal_waiting_events": _Meaning("Usage events held in memory, since the disk does not take them."),
    "journal_alarms": _Meaning("Workers whose journal is in trouble; /readyz says which."),
    "journal_bytes": _Meaning("Bytes of the files in JOURNAL_DIR, on their way to the ledger."),
    "journal_files": _Meaning("Files in JOURNAL_DIR."),
    "journal_oldest_age_seconds": _Meaning("For how long the oldest file has been waiting."),
    "resident_bytes": _Meaning("Memory of the workers."),
    "open_files": _Meaning("File descriptors of the workers."),
}


class WorkerMetrics:
    """What this worker has to say, and its file, which a thread of its own writes: neither streams nor journal wait."""

    def __init__(
        self,
        relay: Relay,
        *,
        journal: Journal,
        recorded: Mapping[str, int],
        transport: httpx.AsyncBaseTransport,
        limiter: Limiter,
    ) -> None:
        self._relay = relay
        self._limiter = limiter
        self._journal = journal
        self._recorded = recorded
        self._transport = transport
        self._file = SnapshotFile(settings.METRICS_DIR)
        self._is_reported = False
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        # What dead workers have left does not pile up where nobody asks for metrics.
        with contextlib.suppress(OSError):
            snapshots.summed_up(settings.METRICS_DIR)
        while not self._is_stopping.wait(_WRITE_SECONDS):
            self.write()

    def write(self) -> None:
        """Write down how things are; from any thread."""
        try:
            self._file.write(self.snapshot())
            self._is_reported = False
        except OSError as exc:
            if not self._is_reported:
                logger.warning("metrics cannot be written down: %s", exc.strerror)
            self._is_reported = True

    def close(self) -> None:
        self._is_stopping.set()
        self.write()
        self._file.close()

    def snapshot(self) -> Snapshot:
        tally = self._relay.metering.tally
        counters, gauges = tally.counters(), self._gauges()
        counters["cpu_seconds",] = time.process_time()
        if isinstance(self._transport, PooledTransport):
            counters["upstream_connections_opened",] = self._transport.opened
            gauges["upstream_connections", "idle"] = self._transport.idle
            gauges["upstream_connections", "busy"] = self._transport.busy
        self._add_ledger(counters)
        self._add_journal(counters, gauges)
        return Snapshot(counters, tally.histograms(), gauges)

    def _gauges(self) -> dict[Key, float]:
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if os.path.exists("/proc/self/statm") else 0
        return {
            ("workers",): 1,
            ("open_streams",): self._relay.open_streams,
            ("limits_away",): int(self._limiter.is_away),
            ("open_streams_limit",): self._relay.limits.max_open_streams,
            ("resident_bytes",): pages * resource.getpagesize(),
            ("open_files",): len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0,
        }

    def _add_ledger(self, counters: dict[Key, float]) -> None:
        recorded = self._recorded
        for name in TOKENS:
            counters["tokens", name.removesuffix("_tokens")] = recorded[name]
        counters["reasoning_tokens",] = recorded["reasoning_tokens"]
        counters["spend_usd",] = recorded["cost_usd"] / UNITS_PER_USD
        counters["unpriced_requests",] = recorded["unpriced_requests"]

    def _add_journal(self, counters: dict[Key, float], gauges: dict[Key, float]) -> None:
        journal = self._journal.status()
        gauges["journal_waiting_events",] = journal.waiting
        gauges["journal_alarms",] = 1 if journal.alarm else 0
        for result in ("recorded", "duplicates", "rejected", "corrupt", "lost"):
            counters["journal_events", result] = getattr(journal, result)


class _Workers(Collector):
    """The sum of all workers, as prometheus_client takes it."""

    def __init__(self, total: Snapshot) -> None:
        self._total = total

    def collect(self) -> Iterator[Metric]:
        total = self._total
        for name, meaning in _COUNTERS.items():
            yield _family(CounterMetricFamily, name, meaning, total.counters)
        for name, meaning in _GAUGES.items():
            yield _family(GaugeMetricFamily, name, meaning, total.gauges)
        for name, meaning in _HISTOGRAMS.items():
            family = HistogramMetricFamily(_PREFIX + name, meaning.help, labels=meaning.labels)
            for labels, values in _of(name, total.histograms):
                if len(values) == len(EDGES_MS[name]) + 2:
                    family.add_metric(labels, _buckets(EDGES_MS[name], values), values[-1] / 1000)
            yield family


def _family(kind: Callable[..., Any], name: str, meaning: _Meaning, numbers: Mapping[Key, float]) -> Metric:
    family: Any = kind(_PREFIX + name, meaning.help, labels=meaning.labels)
    for labels, value in _of(name, numbers):
        family.add_metric(labels, value)
    return family  # type: ignore[no-any-return]


def _of(name: str, numbers: Mapping[Key, Value]) -> Iterator[tuple[tuple[str, ...], Value]]:
    return ((key[1:], numbers[key]) for key in sorted(numbers) if key[0] == name)


def _buckets(edges_ms: tuple[float, ...], values: list[float]) -> list[tuple[str, float]]:
    """Return upper edges in seconds, each with the count of all that is below it."""
    found = []
    count = 0.0
    for edge, inside in zip([*(str(edge / 1000) for edge in edges_ms), "+Inf"], values[:-1], strict=True):
        count += inside
        found.append((edge, count))
    return found


class MetricsPage:
    """An ASGI application behind `ProxyHeadersMiddleware`, so that `scope["client"]` is who asks."""

    def __init__(self, worker: WorkerMetrics) -> None:
        self._worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (refusal := _refusal(scope)) is not None:
            status, headers, body = refusal
        else:
            accept = b",".join(value for name, value in scope["headers"] if name == b"accept").decode("latin-1")
            content_type, body = await asyncio.to_thread(self._rendered, accept)
            status, headers = 200, [(b"content-type", content_type.encode())]
        headers += [(b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _rendered(self, accept: str) -> tuple[str, bytes]:
        # What is shown stands on disk already: no counter goes back if this process is killed now.
        self._worker.write()
        try:
            total = snapshots.summed_up(settings.METRICS_DIR)
        except OSError:
            total = self._worker.snapshot()
        _add_journal_depth(total.gauges)
        registry = CollectorRegistry()
        registry.register(_Workers(total))
        encode, content_type = choose_encoder(accept)
        return content_type, encode(registry)


def _add_journal_depth(gauges: dict[Key, float]) -> None:
    """Add what stands in JOURNAL_DIR, of dead workers too."""
    try:
        found = segments.survey(settings.JOURNAL_DIR)
    except OSError:
        found = []
    gauges["journal_files",] = len(found)
    gauges["journal_bytes",] = sum(report.size_bytes for report in found)
    gauges["journal_oldest_age_seconds",] = segments.oldest_age_s(found, now=time.time())


# Who may see it

_Refusal = tuple[int, wire.RawHeaders, bytes]


def _refusal(scope: Scope) -> _Refusal | None:
    """Return what to answer whoever may not see metrics: what is set of token and networks must be met, each."""
    token, networks = settings.METRICS_TOKEN, settings.METRICS_NETWORKS
    address = _address(scope)
    if networks and not any(address in network for network in networks if address is not None):
        return 403, [], b"METRICS_NETWORKS does not name your address.\n"
    if token and not hmac.compare_digest(wire.bearer_key(scope["headers"]), token.encode()):
        return 401, [(b"www-authenticate", b'Bearer realm="metrics"')], b"METRICS_TOKEN is wanted as a bearer token.\n"
    if not (token or networks) and not (address is not None and address.is_loopback and _is_direct(scope)):
        return 403, [], b"Set METRICS_TOKEN or METRICS_NETWORKS to see metrics from other machines.\n"
    if scope["method"] not in ("GET", "HEAD"):
        return 405, [(b"allow", b"GET, HEAD")], b"Metrics are only read.\n"
    return None


def _address(scope: Scope) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(scope["client"][0])
    except (TypeError, ValueError):
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_direct(scope: Scope) -> bool:
    """Return whether no proxy has passed the request on: to a proxy on this machine everybody is loopback."""
    return not any(wire.names_the_client(name) for name, _ in scope["headers"])
