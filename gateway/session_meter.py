"""What the responses on a WebSocket used, read from a copy of what passes, and said of each when it ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from billing.events import Outcome, Usage, UsageEvent, UsageSource
from gateway import headers as wire
from gateway.access_log import log_access
from gateway.endpoints import Endpoint, Meter, endpoint_of
from gateway.estimator_process import extrapolated
from gateway.metering import Metering, Trace
from gateway.usage import RealtimeReader, RequestFacts, UnfinishedResponse, request_facts
from proxysite.logs import current_request_id

if TYPE_CHECKING:
    from gateway.hold import Hold

_NO_USAGE = Usage()
_RESPONSE = Endpoint("/v1/responses", Meter.RESPONSES)


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
        self._sources: set[UsageSource] = set()
        self._uncounted: UsageEvent | None = None
        self.hold: Hold | None = None
        self.status = 0
        self.upstream_request_id = ""

    def check_not_blocked(self) -> None:
        """Raise KeyBlockedError if the operator has blocked the key."""
        self._metering.check_not_blocked(self.fingerprint)

    def feed(self, message: str | bytes) -> str:
        """Look at a message of the upstream's; return its type, "" for a piece of an answer."""
        return self._reader.feed(message)

    def feed_up(self, message: str | bytes) -> None:
        """Look at a message of the client's that goes up."""
        self._reader.feed_up(message)

    def has_used(self) -> bool:
        """Return whether anything was used since the last `settle`."""
        return self._reader.has_used()

    def is_untold(self) -> bool:
        """Return whether a response has just ended that does not say what it used; see `estimate`."""
        return self._reader.is_untold

    def settle(self, outcome: Outcome) -> None:
        """Say what was used since the last time."""
        for reading in self._reader.take():
            self._append(outcome, reading.usage, reading.model, reading.service_tier, "upstream")

    async def estimate(self, outcome: Outcome) -> None:
        """Say what was used by what has begun and does not say so itself."""
        unfinished = self._reader.take_unfinished()
        asked = request_facts(_RESPONSE, unfinished.prompt) or RequestFacts()
        model = unfinished.model or asked.model or self._reader.model
        usage = _NO_USAGE
        try:
            if not unfinished.is_speech:
                usage = await self._estimated(unfinished, model)
        finally:
            # Whatever happens while tokens are counted, the response is told of. Of speech there are none to count:
            # what it has cost nobody knows, and it is left without a price.
            tier = unfinished.service_tier or asked.dearer_tier
            event = self._append(outcome, usage, model, tier, "estimated")
            if usage == _NO_USAGE:
                self._uncounted = event

    async def _estimated(self, unfinished: UnfinishedResponse, model: str) -> Usage:
        usage = await self._metering.estimates.estimate(
            meter=Meter.RESPONSES, model=model, request_body=unfinished.prompt, output=unfinished.output
        )
        read = extrapolated(usage.input_tokens, seen=unfinished.seen_bytes, kept=unfinished.kept_bytes)
        return Usage(input_tokens=read, output_tokens=usage.output_tokens)

    async def finish(self, outcome: Outcome) -> None:
        """Say what the session came to; one that used nothing is said now."""
        self.settle(outcome)
        try:
            if self._has_unfinished(outcome):
                await self.estimate(outcome)
        finally:
            self.end(outcome)

    def _has_unfinished(self, outcome: Outcome) -> bool:
        """Return whether a response is in progress: one that the upstream closed upon, unanswered, never was."""
        unfinished = self._reader.unfinished
        is_abandoned = outcome in ("client_closed", "refused", "timeout")
        return self.status == 101 and (unfinished.has_begun or (unfinished.is_asked_for and is_abandoned))

    def end(self, outcome: Outcome) -> None:
        """Say that the session is over, or was refused."""
        if not self._has_settled:
            self._append(outcome, Usage(), self._reader.model, "", "none")
        event = self._event(outcome, Usage(), self._reader.model, "", "none")
        self._metering.tally.finished(event, has_begun=False)
        if self.hold is not None:
            self.hold.settle(self._uncounted or event)
        if self._metering.logs_access:
            log_access(event, request_id=self.request_id, headers=self._headers)
        if self._metering.trace is not None:
            self._trace(event, self._metering.trace)

    def _trace(self, event: UsageEvent, trace: Trace) -> None:
        source: UsageSource = next(name for name in ("estimated", "upstream", "none") if name in self._sources)
        whole = msgspec.structs.replace(event, usage=self._used, usage_source=source)
        trace(whole, request_id=self.request_id, headers=self._headers, asked_model=self._asked_model)

    def _append(self, outcome: Outcome, usage: Usage, model: str, service_tier: str, source: UsageSource) -> UsageEvent:
        event = self._event(outcome, usage, model, service_tier, source)
        self._metering.append(event)
        self._has_settled = True
        self._used = self._used.plus(usage)
        self._sources.add(source)
        if self.hold is not None and usage != _NO_USAGE:
            self.hold.settle_part(event)
        return event

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
