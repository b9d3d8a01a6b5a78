"""Traces of requests for an OpenTelemetry collector: one span for each that was metered, made when it has ended.

Imported only where OTEL_ENABLED is set; needs requirements-otel.txt. Endpoint, service name, sampler and the rest are
OpenTelemetry's own variables, which its SDK reads by itself. Names of attributes: its conventions for HTTP and GenAI;
what they have no name for begins with `proxysite.`. No key, no body, no path and no query is in any span.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from billing.events import Usage, UsageEvent
from gateway import headers as wire

logger = logging.getLogger("proxysite.tracing")

_SERVICE = "proxysite"
_PATIENCE_S = 1.5
_SILENCE_S = 60.0
_MS = 1_000_000  # of nanoseconds
# One number that does not fit would cost a whole batch: a session of many responses may add up to anything.
_MOST_TOKENS = 1 << 53
# A version to come may say more than the 55 bytes of today's; whatever is longer is none.
_MOST_TRACEPARENT_BYTES = 100
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"))
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_FAILURES = ("upstream_error", "timeout")

Attributes = dict[str, str | int | float | bool]


class Tracing:
    """What one worker traces with; spans leave by a thread of their own, in batches, or not at all."""

    def __init__(self, *, upstream_url: str, sandbox_key: str) -> None:
        upstream = urlsplit(upstream_url)
        self._server: Attributes = {
            "server.address": str(upstream.hostname),
            "server.port": upstream.port or (443 if upstream.scheme == "https" else 80),
        }
        self._sandbox_key = sandbox_key.encode()
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Exporter()))
        self._tracer = self._provider.get_tracer(_SERVICE)

    def record(self, event: UsageEvent, *, request_id: str, headers: wire.RawHeaders, asked_model: str) -> None:
        """Trace a request that has ended, below the span of the client's that its `traceparent` names.

        `headers` are the client's, `asked_model` the model that it named, where that is known. Never raises.
        """
        try:
            self._record(event, request_id, headers, asked_model)
        except Exception:
            # The edge of tracing: a defect here must not cost a request what is still to be done for it.
            logger.exception("a request could not be traced")

    def _record(self, event: UsageEvent, request_id: str, headers: wire.RawHeaders, asked_model: str) -> None:
        api_key = wire.api_key_of(headers)
        started_ns = int(event.started_at * 1e9)
        ended_ns = started_ns + event.duration_ms * _MS
        span = self._tracer.start_span(
            _name(event),
            context=self._parent(headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(event, request_id, asked_model, api_key),
            start_time=started_ns,
        )
        if span.is_recording():
            if event.outcome in _FAILURES or event.status >= 500:
                span.set_status(StatusCode.ERROR)
            # The sandbox is no upstream.
            if event.proxy_ms and api_key != self._sandbox_key:
                self._record_upstream(event, span, started_ns, ended_ns)
        span.end(end_time=ended_ns)

    def _record_upstream(self, event: UsageEvent, parent: Span, started_ns: int, ended_ns: int) -> None:
        """Trace the upstream's part, from when it was asked until its answer was over."""
        attributes: Attributes = {"http.request.method": _method(event), **self._server}
        if event.endpoint != "other":
            attributes["url.template"] = event.endpoint
        has_answered = event.status > 0 and (event.first_byte_ms > 0 or event.outcome not in _FAILURES)
        if has_answered:
            attributes["http.response.status_code"] = event.status
        is_failure = event.outcome in _FAILURES or event.status >= 400
        if is_failure:
            attributes["error.type"] = event.outcome if event.outcome in _FAILURES else str(event.status)
        asked_ns = started_ns + int(event.proxy_ms * _MS)
        span = self._tracer.start_span(
            _name(event),
            context=set_span_in_context(parent, Context()),
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=asked_ns,
        )
        if is_failure:
            span.set_status(StatusCode.ERROR)
        span.end(end_time=max(asked_ns, ended_ns))

    def _parent(self, headers: wire.RawHeaders) -> Context:
        """Return the client's span; no `tracestate`, which may hold anything."""
        sent = [value for name, value in headers if name == b"traceparent"]
        if len(sent) != 1 or len(sent[0]) > _MOST_TRACEPARENT_BYTES:
            return Context()
        return self._propagator.extract({"traceparent": sent[0].decode("latin-1")}, context=Context())

    def close(self) -> None:
        """Send what is left, to a collector that takes it soon."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(_PATIENCE_S)


class _Exporter(SpanExporter):
    """OTLP over HTTP. Of a collector that is away it says so once, and why, and once that it is back."""

    def __init__(self) -> None:
        self._exporter = trace_exporter.OTLPSpanExporter()
        self._why = ""
        self._is_away = False
        self._silent_until_s = 0.0
        # The exporter writes lines for each batch, and for each attempt at it.
        logging.getLogger(trace_exporter.__name__).addFilter(self._keep_to_itself)

    def _keep_to_itself(self, record: logging.LogRecord) -> bool:
        self._why = self._why or record.getMessage()
        return False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._why = ""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._is_away:
                logger.warning("the collector takes traces again")
            self._is_away = False
        elif not self._is_away and time.monotonic() >= self._silent_until_s:
            # One that comes and goes is told of once a minute.
            self._is_away, self._silent_until_s = True, time.monotonic() + _SILENCE_S
            logger.warning("traces are lost until the collector takes them: %s", self._why)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _resource() -> Resource:
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: _SERVICE}))
    return resource


def _method(event: UsageEvent) -> str:
    return event.method if event.method in _METHODS else "_OTHER"


def _name(event: UsageEvent) -> str:
    """Return `POST /v1/chat/completions`: method and route, of which there are so many and no more."""
    method = event.method if event.method in _METHODS else "HTTP"
    return method if event.endpoint == "other" else f"{method} {event.endpoint}"


def _attributes(event: UsageEvent, request_id: str, asked_model: str, api_key: bytes) -> Attributes:
    found: Attributes = {
        "http.request.method": _method(event),
        "proxysite.request_id": request_id,
        "proxysite.outcome": event.outcome,
        "proxysite.is_stream": event.is_stream,
        "proxysite.proxy_ms": event.proxy_ms,
    }
    optional: Attributes = {
        "http.route": "" if event.endpoint == "other" else event.endpoint,
        "http.response.status_code": event.status,
        "http.request.body.size": event.request_bytes,
        "http.response.body.size": event.response_bytes,
        "proxysite.first_byte_ms": event.first_byte_ms,
        "proxysite.upstream_request_id": _text(event.upstream_request_id, api_key),
        "error.type": _error_type(event),
    }
    found.update((name, value) for name, value in optional.items() if value)
    if event.model or asked_model or event.usage_source != "none":
        found.update(_genai_attributes(event, _text(asked_model, api_key), _text(event.model, api_key)))
    return found


def _genai_attributes(event: UsageEvent, asked_model: str, model: str) -> Attributes:
    found: Attributes = {"gen_ai.provider.name": "openai"}
    if operation := _OPERATIONS.get(event.endpoint):
        found["gen_ai.operation.name"] = operation
    if asked_model or model:
        found["gen_ai.request.model"] = asked_model or model
    if model and asked_model not in ("", model):
        found["gen_ai.response.model"] = model
    input_tokens, output_tokens = _tokens(event.usage)
    if input_tokens or output_tokens:
        found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"] = input_tokens, output_tokens
        found["proxysite.usage_source"] = event.usage_source
    return found


def _tokens(usage: Usage) -> tuple[int, int]:
    """Return all tokens that were read, from a cache or not, and all that were written."""
    text = usage.input_tokens + usage.cached_input_tokens + usage.cache_write_tokens
    audio = usage.audio_input_tokens + usage.cached_audio_input_tokens
    image = usage.image_input_tokens + usage.cached_image_input_tokens
    written = usage.output_tokens + usage.audio_output_tokens + usage.image_output_tokens
    return min(text + audio + image, _MOST_TOKENS), min(written, _MOST_TOKENS)


def _error_type(event: UsageEvent) -> str:
    is_session = event.status == 101  # which its client ends by leaving
    if event.outcome == "completed" or (is_session and event.outcome == "client_closed"):
        return str(event.status) if event.status >= 500 else ""
    return event.outcome


def _text(value: str, api_key: bytes) -> str:
    """Return a stranger's text if it can be sent, and is not the key that somebody has put in the wrong place."""
    raw = value.encode("utf-8", "replace")
    return "" if api_key and api_key in raw else raw.decode()
