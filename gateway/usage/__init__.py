"""Token counts from what an upstream said: JSON bodies, event streams, WebSocket messages. Pure."""

from __future__ import annotations

from gateway.endpoints import Endpoint, Meter
from gateway.usage.client_messages import ClientMessage, client_message
from gateway.usage.facts import PromptSample, RequestFacts, multipart_facts, prompt_sample, request_facts, weighed_form
from gateway.usage.json_reader import JsonReader
from gateway.usage.long_body import LongBody
from gateway.usage.reading import Reading, UsageReader
from gateway.usage.sample import OutputSample
from gateway.usage.sockets import RESPONSE_ENDS, RealtimeReader, RealtimeReading
from gateway.usage.sse_reader import SseReader
from gateway.usage.unfinished import UnfinishedResponse

__all__ = [
    "RESPONSE_ENDS",
    "ClientMessage",
    "LongBody",
    "OutputSample",
    "PromptSample",
    "Reading",
    "RealtimeReader",
    "RealtimeReading",
    "RequestFacts",
    "SseReader",
    "UnfinishedResponse",
    "UsageReader",
    "client_message",
    "multipart_facts",
    "prompt_sample",
    "reader_for",
    "request_facts",
    "weighed_form",
]

MAX_SAMPLE_BYTES = 16 << 10
_USUAL = b"application/json"
# Answers that are nothing but a file.
_OPAQUE = (b"audio/", b"image/", b"video/", b"application/octet-stream", b"application/zip", b"application/sdp")


def reader_for(
    endpoint: Endpoint, content_type: bytes, *, max_sample_bytes: int = MAX_SAMPLE_BYTES
) -> UsageReader | None:
    """Return a reader for an answer with this Content-Type; None where there is nothing to read.

    An answer of no or an unexpected type is taken for JSON. `max_sample_bytes` bounds what is held for an estimate.
    """
    if endpoint.meter is Meter.NONE or endpoint.meter is Meter.REALTIME:
        return None
    if content_type == _USUAL:
        return JsonReader(endpoint.meter, max_sample_bytes=max_sample_bytes)
    kind = content_type[:64].lower()
    if kind.startswith(b"text/event-stream"):
        return SseReader(endpoint.meter, max_sample_bytes=max_sample_bytes)
    if kind.startswith(_OPAQUE):
        return None
    return JsonReader(endpoint.meter, max_sample_bytes=max_sample_bytes)
