"""The head of an answer as the client sees it: the upstream's, and what this gateway says of its own."""

from __future__ import annotations

import time
from typing import NamedTuple

from gateway import headers as wire
from gateway.decoding import Decoder
from gateway.request_meter import RequestMeter

_EVENT_STREAM = b"text/event-stream"


class Head(NamedTuple):
    """`decoder` is that of a compressed event stream which has to be unpacked on its way."""

    answer: wire.ToClient
    has_body: bool
    decoder: Decoder | None


def head_of(status: int, fields: wire.RawHeaders, *, method: str, meter: RequestMeter) -> Head:
    """Make the client's head of the upstream's, and show it to the meter."""
    answer = wire.to_client(fields)
    decoder = None
    if answer.content_encoding and (meter.seen.is_spliced or (meter.hold is not None and meter.hold.watches)):
        # The usage event that this gateway asked for cannot be taken out of compressed bytes, nor can these be counted.
        answer, decoder = _unpacked(answer)
    meter.take_head(status, answer)
    headers = answer.headers
    has_body = answer.body_bytes != 0 and status not in (204, 304) and method != "HEAD"
    if answer.is_event_stream and has_body and answer.body_bytes > 0:
        # What goes out may be shorter by the usage event, or longer by an error event: it has no length yet.
        headers = wire.without_length(headers)
        answer = answer._replace(headers=headers)
    if _is_of_events(answer):
        # A compressed one, too, which is no event stream here: a proxy in front must not hold it back.
        headers.append((b"x-accel-buffering", b"no"))
    headers.append((b"server-timing", _server_timing(meter)))
    request_id = meter.request_id.encode()
    headers.append((b"x-proxy-request-id", request_id))
    if not answer.request_id:
        headers.append((b"x-request-id", request_id))
    return Head(answer, has_body, decoder)


def _is_of_events(answer: wire.ToClient) -> bool:
    return answer.content_type[: len(_EVENT_STREAM)].lower() == _EVENT_STREAM


def _unpacked(answer: wire.ToClient) -> tuple[wire.ToClient, Decoder | None]:
    """Return the head of a compressed event stream as it is once unpacked; any other's as it is."""
    decoder = Decoder(answer.content_encoding)
    if decoder.gave_up or not _is_of_events(answer):
        return answer, None
    headers = [pair for pair in wire.without_length(answer.headers) if pair[0].lower() != b"content-encoding"]
    plain = answer._replace(headers=headers, is_event_stream=True, content_encoding=b"", body_bytes=-1)
    return plain, decoder


def _server_timing(meter: RequestMeter) -> bytes:
    """Return how long the gateway and the upstream took until the answer began, in milliseconds."""
    # Not the loop's clock: uvloop's counts whole milliseconds. In whole numbers, which are quicker to write out.
    own, own_rest = divmod(int((meter.asked_s - meter.started_s) * 1e5), 100)
    upstream, upstream_rest = divmod(int((time.perf_counter() - meter.asked_s) * 1e5), 100)
    return b"proxy;dur=%d.%02d, upstream;dur=%d.%02d" % (own, own_rest, upstream, upstream_rest)
