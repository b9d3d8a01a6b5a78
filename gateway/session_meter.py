"""What the responses on a WebSocket used, read from a copy of what passes, and said of each when it ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from billing.events import Outcome, Usage, UsageEvent, UsageSource
from gateway import headers as wire
from gateway.access_log import log_access
from gateway.endpoints import endpoint_of
from gateway.metering import Metering, Trace
from gateway.usage import RealtimeReader
from proxysite.logs import current_request_id

if TYPE_CHECKING:
    from gateway.hold import Hold

_NO_USAGE = Usage()


class SessionMeter:
    """One WebSocket session: what each of its responses used, and at its end what the session came to."""

    def __init__(self, metering: Metering, scope: Any, *, model: str) -> None:
        self._metering = metering
        self._started_at = time.time()
        self.started_s = time.perf_counter()
        self.request_id = metering.new_event_id()
        current_request_id.set(self.request_id)
        self._headers: wire.RawHeaders = scope["headers"]
        self.fingerprint, self._hint = metering.identify(self._headers)
        self.endpoint = endpoint_of("GET", scope["raw_path"])
        self._reader = RealtimeReader(model)
        self._has_settled = False
        self._asked_model = model
        self._used = _NO_USAGE  # by the whole session
        self.hold: Hold | None = None
        self.status = 0
        self.upstream_request_id = ""

    def check_not_blocked(self) -> None:
        """Raise KeyBlockedError if the operator has blocked the key."""
        self._metering.check_not_blocked(self.fingerprint)

    def feed(self, message: str | bytes) -> str:
        """Look at a message of the upstream's; return its type, "" for a piece of an answer."""
        return self._reader.feed(message)

    def has_used(self) -> bool:
        """Return whether anything was used since the last `settle`."""
        return self._reader.has_used()

    def settle(self, outcome: Outcome, *, is_end: bool) -> None:
        """Say what was used since the last time; a session that used nothing is said once, at its end."""
        for reading in self._reader.take():
            self._append(outcome, reading.usage, reading.model, reading.service_tier, "upstream")
        if is_end and not self._has_settled:
            self._append(outcome, Usage(), self._reader.model, "", "none")
        if is_end:
            event = self._event(outcome, Usage(), self._reader.model, "", "none")
            self._metering.tally.finished(event, has_begun=False)
            if self.hold is not None:
                self.hold.settle(event)
            if self._metering.logs_access:
                log_access(event, request_id=self.request_id, headers=self._headers)
            if self._metering.trace is not None:
                self._trace(event, self._metering.trace)

    def _trace(self, event: UsageEvent, trace: Trace) -> None:
        source: UsageSource = "none" if self._used == _NO_USAGE else "upstream"
        whole = msgspec.structs.replace(event, usage=self._used, usage_source=source)
        trace(whole, request_id=self.request_id, headers=self._headers, asked_model=self._asked_model)

    def _append(self, outcome: Outcome, usage: Usage, model: str, service_tier: str, source: UsageSource) -> None:
        event = self._event(outcome, usage, model, service_tier, source)
        self._metering.append(event)
        self._has_settled = True
        self._used = self._used.plus(usage)
        if self.hold is not None and usage != _NO_USAGE:
            self.hold.settle_part(event)

    def _event(self, outcome: Outcome, usage: Usage, model: str, service_tier: str, source: UsageSource) -> UsageEvent:
        return UsageEvent(
            # The first event is found under the id that the client knows; a long session has more of them.
            id=self._metering.new_event_id() if self._has_settled else self.request_id,
            started_at=self._started_at,
            key_fingerprint=self.fingerprint,
            key_hint=self._hint,
            method="GET",
            endpoint=self.endpoint.route,
            model=model[:100],
            service_tier=service_tier,
            is_stream=True,
            status=self.status,
            outcome=outcome,
            usage_source=source,
            usage=usage,
            upstream_request_id=self.upstream_request_id,
            duration_ms=round((time.perf_counter() - self.started_s) * 1000),
        )
