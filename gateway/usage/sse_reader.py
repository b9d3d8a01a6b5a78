"""Usage from a stream of server-sent events. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.sse import EventAligner
from gateway.usage.members import first_members, members_at_end
from gateway.usage.reading import IDENTIFIED, RUN, Reading
from gateway.usage.sample import DATA, OutputSample, Sampler
from gateway.usage.shapes import UNREADABLE, Reply, has_failed, name_in, reply_in, reply_of, usage_in

_MOST_EVENT_BYTES = 256 << 10
_HEAD_BYTES = 4 << 10
_TAIL_BYTES = 64 << 10
_EVENTS_WITH_FACTS = 4
_COMMENT = ord(":")
_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_COMMON_ENDS = (b"\n\n", b"\r\n\r\n")
_EVENT_ENDS = (*_COMMON_ENDS, b"\r\r", b"\n\r\n", b"\r\r\n", b"\n\r")
_FIRST_END = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_LONGEST_END = 3
# Where quotes are rarer, there is a file among the events.
_MOST_WORD_BYTES = 256
_DATA_FIELD = re.compile(rb"(?:^|[\r\n])data: ?")
# What stands in every report of tokens and, unlike "usage", in no `"usage":null`.
_TOKENS = b'_tokens"'
# What the model writes, of the routes whose other events repeat the request, or what has been written.
_PIECES = {Meter.RESPONSES: b'.delta"', Meter.TRANSCRIPTION: b'.delta"'}
_MARKERS = {Meter.TRANSCRIPTION: b'"usage"', Meter.IMAGES: b'.completed"'}
_LAST_EVENTS = {
    "response.completed",
    "response.incomplete",
    "response.failed",
    "image_generation.completed",
    "image_edit.completed",
    "transcript.text.done",
    "speech.audio.done",
}
_IMAGE_EVENTS = {"image_generation.completed", "image_edit.completed"}
# Behind it a stream has only its usage left to say.
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_RESPONSE_EVENTS = (b'"response.completed"', b'"response.incomplete"', b'"response.failed"')


class SseReader:
    """A `UsageReader` of events. The last usage in a stream is the usage: some upstreams report as they go.

    Of an event beyond 256 KiB only the first 4 KiB and the last 64 KiB are looked at. A stream of images ends with the
    last of `images_asked`.
    """

    images_asked = 1

    def __init__(self, meter: Meter, *, max_sample_bytes: int) -> None:
        self._meter = meter
        self._is_stored = meter is Meter.STORED
        self._marker = _MARKERS.get(meter, _TOKENS)
        self._aligner = EventAligner(_MOST_EVENT_BYTES)
        self._is_aligned = True
        self._piece = _PIECES.get(meter)
        self._sampler = Sampler(max_sample_bytes)
        self._long: _LongEvent | None = None
        self._last = b""
        self._events_for_facts = _EVENTS_WITH_FACTS
        self._usage: Usage | None = None
        self._images = 0
        self._model = self._service_tier = self._object_id = ""
        self._is_complete = self._in_background = False

    def feed(self, chunk: bytes) -> None:
        if self._is_aligned and chunk.endswith(_COMMON_ENDS):
            events = chunk
        else:
            events = self._whole_events(chunk)
            if not events:
                return
        if events[0] != _COMMENT:
            self._last = events
        if self._usage is None:
            self._sample(events)
        # Not `in`, which for bytes raises an error and drops it again: as slow as all else that is done here.
        if self._events_for_facts or events.find(self._marker) >= 0:
            self._read(events)

    def has_ended(self) -> bool:
        """Return whether the events fed last are those that end the stream."""
        return any(self._says_end(data) for data in _data_of(self._last))

    def is_finishing(self) -> bool:
        """Return whether the model has come to its end, and the usage has not."""
        return self._usage is None and _FINISHED.search(self._last) is not None

    def result(self, *, is_whole: bool = True) -> Reading:
        rest = self._aligner.flush()
        # The end of a stream also ends its last event, for OpenAI's own clients.
        if self._long is not None:
            self._long.feed(rest)
            if is_whole:
                self._take(self._long.reply())
            self._long = None
        elif rest:
            self._last = rest
            if self._usage is None:
                self._sample(rest)
            self._read(rest)
        if not self._is_complete:
            self._is_complete = any(self._says_end(data) for data in _data_of(self._last))
        usage = self._usage
        if self._images:
            usage = msgspec.structs.replace(usage or Usage(), images=self._images)
        return Reading(
            None if self._is_stored else usage,
            self._model,
            self._service_tier,
            self._is_complete,
            self._object_id,
            usage if self._is_stored else None,
            self._in_background,
            usage is None and any(has_failed(_reply_in(data)) for data in _data_of(self._last)),
        )

    def output_sample(self) -> OutputSample:
        return OutputSample() if self._usage is not None else self._sampler.sample(self._meter, of_events=True)

    def _sample(self, events: bytes) -> None:
        """Keep what is needed for an estimate, of these events."""
        if self._piece is not None:
            border = next((end for end in _EVENT_ENDS if events.endswith(end)), _COMMON_ENDS[0])
            pieces = [event for event in events.split(border) if event.find(self._piece) >= 0]
            events = b"".join(pieces)
        elif len(events) > _HEAD_BYTES and events.count(b'"') * _MOST_WORD_BYTES < len(events):
            events = DATA.sub(b"", events)
        self._sampler.add(events)

    def _whole_events(self, chunk: bytes) -> bytes:
        events = self._aligner.feed(chunk)
        # Else a part of an event waits in the aligner.
        self._is_aligned = chunk.endswith(_EVENT_ENDS)
        if events == b"\n":
            return b""  # of the end of an event that was taken at its CR
        if events and (self._long is not None or not events.endswith(_EVENT_ENDS)):
            return self._feed_long(events)
        return events

    def _feed_long(self, events: bytes) -> bytes:
        """Take what belongs to an event that is too long to be held; return the whole events behind it."""
        if self._long is None:
            self._long = _LongEvent()
        before = self._long.last_bytes
        end = _FIRST_END.search(before + events) if events.endswith(_EVENT_ENDS) else None
        end_at = end.end() - len(before) if end else len(events)
        self._long.feed(events[:end_at])
        if self._long.is_text and self._piece is None:
            self._sampler.skip(end_at)
        if end is not None:
            self._take(self._long.reply())
            self._long = None
        return events[end_at:]

    def _read(self, events: bytes) -> None:
        for data in _data_of(events):
            if data == _DONE:
                self._is_complete = True
            elif self._events_for_facts or data.find(self._marker) >= 0:
                self._events_for_facts = max(self._events_for_facts - 1, 0)
                self._take(_reply_in(data))

    def _says_end(self, data: bytes) -> bool:
        return data == _DONE or self._is_last(name_in(_reply_in(data).type))

    def _is_last(self, kind: str) -> bool:
        return kind in _LAST_EVENTS and (kind not in _IMAGE_EVENTS or self._images >= self.images_asked)

    def _take(self, reply: Reply) -> None:
        kind = name_in(reply.type)
        inner = reply
        if reply.response:
            inner = _reply_in(bytes(reply.response))
        usage = usage_in(inner.usage, self._meter)
        is_run = self._meter is Meter.RUNS and name_in(reply.object) == RUN
        if self._meter is Meter.RUNS and not is_run:
            usage = None  # a step's, which is a part of its run's
        if usage is not None:
            self._usage = usage
        self._images += self._meter is Meter.IMAGES and kind in _IMAGE_EVENTS
        self._is_complete = self._is_complete or self._is_last(kind)
        if usage is not None or not self._model:
            self._model = name_in(inner.model) or self._model
            self._service_tier = name_in(inner.service_tier) or self._service_tier
            if self._meter in IDENTIFIED:
                self._object_id = name_in(inner.id) or self._object_id
            self._in_background = self._in_background or is_run or bytes(inner.background) == b"true"
        if self._model:
            self._events_for_facts = 0


class _LongEvent:
    """The two ends of an event that is too long to be held."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""

    @property
    def last_bytes(self) -> bytes:
        """The bytes in which the end of this event may have begun."""
        return self._tail[-_LONGEST_END:]

    @property
    def is_text(self) -> bool:
        """Whether it begins with something else than a file's base64, of which no tokens can be counted."""
        return DATA.search(self._head) is None

    def feed(self, part: bytes) -> None:
        if len(self._head) < _HEAD_BYTES:
            self._head += part[: _HEAD_BYTES - len(self._head)]
        self._tail = part[-_TAIL_BYTES:] if len(part) >= _TAIL_BYTES else (self._tail + part)[-_TAIL_BYTES:]

    def reply(self) -> Reply:
        """Return what can be known of the event, with the members of its `response` as its own."""
        field = _DATA_FIELD.search(self._head)
        members, _ = first_members(self._head[field.end() :]) if field else ({}, False)
        members |= members_at_end(self._tail)
        if members.get("type") in _RESPONSE_EVENTS:
            members = members_at_end(self._tail, depth_wanted=2) | {"type": members["type"]}
        return reply_of(members)


def _data_of(events: bytes) -> Iterator[bytes]:
    """Yield the data of each event; the last may lack its empty line."""
    if events.startswith(b"data: ") and events.find(b"\n") == len(events) - 2 and events.find(b"\r") < 0:
        yield events[6:-2]
        return
    lines: list[bytes] = []
    # Of bytes, splitlines() splits at CR LF, CR and LF only, as events do.
    for line in events.removeprefix(_BOM).splitlines():
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif not line and lines:
            yield b"\n".join(lines)
            lines.clear()
    if lines:
        yield b"\n".join(lines)


def _reply_in(data: bytes) -> Reply:
    try:
        return reply_in(data)
    except UNREADABLE:
        return reply_of(first_members(data)[0])
