"""What a request used, read from a copy of what passes, and said once, however the request ends."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import msgspec

from billing.events import Outcome, Usage, UsageEvent, UsageSource
from gateway import headers as wire
from gateway.access_log import log_access
from gateway.asgi import Memory
from gateway.decoding import Decoder
from gateway.endpoints import Endpoint, Meter, endpoint_of
from gateway.seen_request import ESTIMATED, SeenRequest
from gateway.splice import UsageEventRemover
from gateway.usage import OutputSample, Reading, RequestFacts, SseReader, UsageReader, reader_for
from proxysite.logs import current_request_id

if TYPE_CHECKING:
    from gateway.hold import Hold
    from gateway.metering import Metering

logger = logging.getLogger("gateway.metering")

_MOMENT_S = 0.5
_READ_ON = (*ESTIMATED, Meter.IMAGES, Meter.TRANSCRIPTION, Meter.TRANSLATION, Meter.RUNS)
# What stands in the last event of a stream, which a client may take for the end.
_DONE = b"[DONE]"
_LAST_EVENT = re.compile(rb"\[DONE\]|\.(?:completed|incomplete|failed|done)\"")
_ENDS_WITH_DONE = (Meter.CHAT, Meter.COMPLETIONS)
_RUNS = "/v1/threads/{thread_id}/runs"
_NO_USAGE = Usage()
_NO_FACTS = RequestFacts()


class RequestMeter:
    """One HTTP request. Exactly one event comes of it, at the first `finish`, under the id `request_id`.

    What the upstream need not wait for is put off until `look`, or until somebody asks.
    """

    # Defaults of the class, not of each meter: a request sets a third of them.
    response_bytes = 0
    status = 0
    upstream_request_id = ""
    asked_s = first_byte_s = 0.0
    is_finished = False
    is_sent = False  # or may have been, where the transport does not say
    _request_id = ""
    _identity: tuple[str, str] | None = None
    _reader: UsageReader | None = None
    _decoder: Decoder | None = None
    _remover: UsageEventRemover | None = None
    _unsettled: UsageEvent | None = None
    hold: Hold | None = None  # of limits, see `gateway.limiter`

    def __init__(self, metering: Metering, scope: Any) -> None:
        self._metering = metering
        self._started_at = time.time()
        self.started_s = time.perf_counter()
        if "head_came_s" in scope:  # a body that our own server has waited for counts as one that the relay waits for
            self._started_at -= self.started_s - scope["head_came_s"]
            self.started_s = scope["head_came_s"]
        self.method: str = scope["method"]
        self._headers: wire.RawHeaders = scope["headers"]
        self._memory: Memory | None = scope.get("memory")
        self.endpoint: Endpoint = endpoint_of(self.method, scope["raw_path"])
        self.seen = SeenRequest(metering, self.endpoint)

    @property
    def request_id(self) -> str:
        request_id = self._request_id
        if not request_id:
            request_id = self._request_id = self._metering.new_event_id()
        return request_id

    @property
    def fingerprint(self) -> str:
        return self._identify()[0]

    def _identify(self) -> tuple[str, str]:
        identity = self._identity
        if identity is None:
            identity = self._identity = self._metering.identify(self._headers, self._memory)
        return identity

    def look(self) -> None:
        """Find out what the record will say of the request, now that it is on its way. Never raises."""
        self.is_sent = True
        self._identify()
        self.seen.facts()

    # The way up

    def check_not_blocked(self) -> None:
        """Raise KeyBlockedError if the operator has blocked the key."""
        if self._metering.blocked:
            self._metering.check_not_blocked(self.fingerprint)

    # The way back

    def take_head(self, status: int, answer: wire.ToClient) -> None:
        """Look at the head of the upstream's answer."""
        self.first_byte_s = time.perf_counter()
        self.status = status
        self.upstream_request_id = answer.request_id[:100].decode("latin-1")
        if 200 <= status < 300:
            self._reader = reader_for(self.endpoint, answer.content_type)
        if self._reader is not None and answer.content_encoding:
            self._decoder = Decoder(answer.content_encoding)
        if self.endpoint.meter is Meter.IMAGES and isinstance(self._reader, SseReader):
            facts = self.seen.facts_at_end()
            self._reader.images_asked = facts.choices if facts else 1
        if self.seen.is_spliced and answer.is_event_stream:
            self._remover = UsageEventRemover()

    def feed(self, chunk: bytes) -> None:
        """Look at a chunk of the answer as it stood on the wire."""
        self.response_bytes += len(chunk)
        reader = self._reader
        if reader is not None and not self.is_finished:
            if self._decoder is None:
                reader.feed(chunk)
            else:
                for part in self._decoder.parts(chunk):
                    reader.feed(part)

    def without_usage(self, events: bytes) -> bytes:
        """Return whole events without what was only said because this gateway asked for it."""
        return events if self._remover is None else self._remover.feed(events)

    def has_ended(self) -> bool:
        """Return whether what was fed last ends an event stream."""
        reader = self._reader
        return isinstance(reader, SseReader) and not self.is_finished and reader.has_ended()

    def may_be_last(self, events: bytes) -> bool:
        """Return whether a client may take these events, fed just now, for the end of the answer."""
        reader = self._reader
        if not isinstance(reader, SseReader) or self.is_finished:
            return False
        is_marked = (
            events.find(_DONE) >= 0
            if self.endpoint.meter in _ENDS_WITH_DONE
            else _LAST_EVENT.search(events) is not None
        )
        return is_marked and reader.has_ended()

    # The end

    def worth_reading_on_s(self, most_s: float) -> float:
        """Return for how long to read the answer on for nobody, for usage that the upstream has yet to say.

        That is `most_s` at most, but for a moment where nothing else is missing: to leave then shall save nobody money.
        """
        if not self.is_sent or self.is_finished or self.endpoint.meter not in _READ_ON:
            return 0.0
        return most_s or (_MOMENT_S if self._tells_usage_soon() else 0.0)

    def _tells_usage_soon(self) -> bool:
        is_asked = self.seen.is_spliced or self.seen.known_facts().includes_usage
        return is_asked and isinstance(self._reader, SseReader) and self._reader.is_finishing()

    async def finish(self, outcome: Outcome, *, status: int | None = None, is_whole: bool = False) -> None:
        """Say what the request used. Before the client can hold the whole answer: what it saw is then on disk."""
        counting = self.finish_soon(outcome, status=status, is_whole=is_whole)
        if counting is not None:
            await counting
        self.settle()

    def finish_soon(
        self, outcome: Outcome, *, status: int | None = None, is_whole: bool = False
    ) -> Awaitable[None] | None:
        """Do what `finish` does, at once where the upstream has told the usage; else return what is to be awaited.

        `settle` is to be called afterwards, when the client has its answer.
        """
        if self.is_finished:
            return None
        self.is_finished = True
        if status is not None:
            self.status = status
        reading = self._reading(is_whole=is_whole)
        if reading.usage is not None:
            self._say(outcome, reading, reading.usage, "upstream")
        elif self._is_to_be_estimated(outcome, reading):
            return self._estimated(outcome, reading)
        else:
            usage = self._own_count(outcome)
            self._say(outcome, reading, usage or _NO_USAGE, "estimated" if usage else "none")
        return None

    def settle(self) -> None:
        """Count what `finish_soon` has told of, where nobody waits for it."""
        event, self._unsettled = self._unsettled, None
        if event is None:
            return
        metering = self._metering
        metering.tally.finished(event, has_begun=self.first_byte_s > 0)
        if metering.logs_access:
            log_access(event, request_id=self.request_id, headers=self._headers)
        if metering.trace is not None:
            asked_model = self.seen.known_facts().model
            metering.trace(event, request_id=self.request_id, headers=self._headers, asked_model=asked_model)
        if self.hold is not None:
            self.hold.settle(event)

    def _say(self, outcome: Outcome, reading: Reading, usage: Usage, source: UsageSource) -> None:
        metering = self._metering
        event = self._unsettled = self._event(outcome, reading, usage, source)
        if reading.in_background and reading.usage is not None and reading.object_id:
            # Who follows the response later on sees the same usage again.
            event = msgspec.structs.replace(event, id=self._id_of_object(reading))
        metering.append(event)
        if reading.stored_usage is not None and (reading.in_background or self.endpoint.meter is Meter.BATCH):
            metering.append(self._event_of_object(reading))
        self.seen.forget()

    def _reading(self, *, is_whole: bool) -> Reading:
        try:
            return self._reader.result(is_whole=is_whole) if self._reader is not None else Reading()
        except Exception:
            # The edge of metering: a defect in reading must not cost the client its answer, nor us the event.
            token = current_request_id.set(self.request_id)  # in a callback it is another one's
            logger.exception("an answer could not be read")
            current_request_id.reset(token)
            return Reading()

    def _may_have_used(self, outcome: Outcome) -> bool:
        """Return whether a request of which the upstream has not said the usage may have used anything."""
        has_reached_upstream = self.is_sent and outcome != "refused"
        return has_reached_upstream and self.status < 300 and not (self.status == 0 and outcome == "upstream_error")

    def _own_count(self, outcome: Outcome) -> Usage | None:
        """Return what this side knows by itself."""
        if self.endpoint.meter is not Meter.SPEECH or not self._may_have_used(outcome):
            return None
        facts = self.seen.facts()
        return None if facts is None else Usage(characters=facts.characters)

    def _is_to_be_estimated(self, outcome: Outcome, reading: Reading) -> bool:
        is_seen = self.seen.body is not None or self.seen.long_body is not None
        return is_seen and self._may_have_used(outcome) and not (self._goes_on(reading) or self._has_failed(reading))

    def _has_failed(self, reading: Reading) -> bool:
        """Return whether the answer is nothing but a failure, for which no upstream asks money."""
        return reading.has_failed and self._reader is not None and not self._reader.output_sample().text

    def _goes_on(self, reading: Reading) -> bool:
        """Return whether the response is made in the background: what it used is told to whoever asks for it later.

        An upstream that has answered has said so itself; many take no notice of the wish.
        """
        if self.response_bytes or self.endpoint.meter is not Meter.RESPONSES:
            return reading.in_background
        facts = self.seen.facts_at_end()
        return facts is not None and facts.in_background

    async def _estimated(self, outcome: Outcome, reading: Reading) -> None:
        seen, usage = self.seen, None
        facts = seen.facts_at_end()
        try:
            output = self._reader.output_sample() if self._reader is not None else OutputSample()
            usage = await self._metering.estimates.estimate(
                meter=self.endpoint.meter,
                model=facts.model if facts else "",
                request_body=seen.body or b"",
                output=output,
                input_guess=seen.long_body.tokens if seen.long_body is not None else 0,
            )
        finally:
            # Whatever happens while tokens are counted, the request is told of.
            self._say(outcome, reading, usage or _NO_USAGE, "estimated" if usage else "none")

    def _event(self, outcome: Outcome, reading: Reading, usage: Usage, source: UsageSource) -> UsageEvent:
        facts = self.seen.facts_at_end() or _NO_FACTS
        now_s, started_s = time.perf_counter(), self.started_s
        fingerprint, hint = self._identify()
        return UsageEvent(
            id=self.request_id,
            started_at=self._started_at,
            key_fingerprint=fingerprint,
            key_hint=hint,
            method=self.method[:16],
            endpoint=self.endpoint.route,
            # Of a request that never went up no model was asked.
            model=reading.model or (facts.model if self.is_sent or outcome != "client_closed" else ""),
            # An upstream says which tier it used. One that has not come to say so may have used a dear one.
            service_tier=reading.service_tier or (facts.dearer_tier if source != "upstream" else ""),
            is_stream=facts.is_stream,
            status=self.status,
            outcome=outcome,
            usage_source=source,
            usage=usage,
            upstream_request_id=self.upstream_request_id,
            # Not by `round`, which takes ten times as long.
            first_byte_ms=int((self.first_byte_s - started_s) * 1000 + 0.5) or 1 if self.first_byte_s else 0,
            duration_ms=int((now_s - started_s) * 1000 + 0.5),
            proxy_ms=int((self.asked_s - started_s) * 1e6 + 0.5) / 1000 if self.asked_s else 0.0,
            request_bytes=self.seen.size_bytes,
            response_bytes=self.response_bytes,
        )

    def _event_of_object(self, reading: Reading) -> UsageEvent:
        """Return the usage of a batch, or of a response or a run in the background, which no request waited for.

        It stands under an id of the object's own: each further look at the object adds nothing.
        """
        is_batch = self.endpoint.meter is Meter.BATCH
        made_by = _RUNS if self.endpoint.route.startswith(_RUNS) else "/v1/responses"
        event = self._event("completed", reading, reading.stored_usage or Usage(), "upstream")
        return msgspec.structs.replace(
            event,
            id=self._id_of_object(reading),
            method="POST",
            endpoint="/v1/batches" if is_batch else made_by,
            is_batch=is_batch,
        )

    def _id_of_object(self, reading: Reading) -> str:
        identity = self._metering.fingerprint(reading.object_id.encode("utf-8", "replace"))
        return f"{'batch' if self.endpoint.meter is Meter.BATCH else 'response'}{identity[:48]}"
