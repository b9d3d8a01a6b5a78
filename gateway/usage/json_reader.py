"""Usage from a JSON answer of any size. Pure."""

from __future__ import annotations

from collections import deque

import msgspec

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.usage.members import first_members, members_at_end
from gateway.usage.reading import IDENTIFIED, RUN, Reading
from gateway.usage.sample import OutputSample, Sampler
from gateway.usage.shapes import (
    UNREADABLE,
    Reply,
    duration_in,
    elements_in,
    has_failed,
    is_settled,
    name_in,
    reply_in,
    reply_of,
    usage_in,
)

_MOST_WHOLE_BYTES = 256 << 10
_HEAD_BYTES = 4 << 10
_TAIL_BYTES = 64 << 10
_BOM = b"\xef\xbb\xbf"
_USAGE = b'"usage"'
_IMAGE_NAMES = (b'"b64_json"', b'"url"')
_LONGEST_NAME = max(map(len, _IMAGE_NAMES))
_VERBOSE = (Meter.TRANSCRIPTION, Meter.TRANSLATION)
_STORED = (Meter.BATCH, Meter.STORED)
_OF_ONE_USAGE = (Meter.CHAT, Meter.COMPLETIONS, Meter.EMBEDDINGS)
_MOST_USAGE_BYTES = 2 << 10


class JsonReader:
    """A `UsageReader` that holds an answer whole up to 256 KiB, and only its two ends beyond that.

    In a longer answer usage is looked for in the first 4 KiB and in the last 64 KiB, among the members of the
    outermost object, and between them where no inner object has one; where the answer was cut it may find nothing.
    """

    def __init__(self, meter: Meter, *, max_sample_bytes: int) -> None:
        self._meter = meter
        self._max_sample_bytes = max_sample_bytes
        self._whole: list[bytes] = []
        self._ends: _Ends | None = None
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._ends is not None:
            self._ends.feed(chunk)
            return
        self._whole.append(chunk)
        if self._size > _MOST_WHOLE_BYTES:
            self._ends = _Ends(b"".join(self._whole), self._max_sample_bytes, self._meter)
            self._whole.clear()

    def result(self, *, is_whole: bool = True) -> Reading:
        """Return what has been found. `is_whole`: the upstream's connection did not break.

        Of a cut answer beyond 256 KiB only the beginning counts, where an inner object cannot pass for the outermost.
        """
        if self._ends is None:
            return self._read_whole(b"".join(self._whole).removeprefix(_BOM), is_whole=is_whole)
        reply = reply_of(self._ends.members(is_whole=is_whole))
        is_complete = is_whole and self._ends.is_closed()
        return self._reading(reply, images=self._ends.images if is_whole else 0, is_complete=is_complete)

    def output_sample(self) -> OutputSample:
        if self.result().usage is not None:
            return OutputSample()
        if self._ends is not None:
            return self._ends.sampler.sample(self._meter, of_events=False)
        sampler = Sampler(self._max_sample_bytes)
        for chunk in self._whole:
            sampler.add(chunk)
        return sampler.sample(self._meter, of_events=False)

    def _read_whole(self, body: bytes, *, is_whole: bool) -> Reading:
        try:
            reply = reply_in(body)
        except UNREADABLE:
            # Cut, or more than the parser takes: NaN, half a surrogate pair, a depth of thousands.
            if not is_whole and _USAGE not in body:
                body = body[:_HEAD_BYTES]  # all of it costs some 20 ms
            members, is_closed = first_members(body)
            return self._reading(reply_of(members), images=0, is_complete=is_closed)
        images = _elements(reply.data) if self._meter is Meter.IMAGES else 0
        return self._reading(reply, images=images, is_complete=True)

    def _reading(self, reply: Reply, *, images: int, is_complete: bool) -> Reading:
        meter = self._meter
        usage = usage_in(reply.usage, meter)
        if usage is None and meter in _VERBOSE:
            usage = duration_in(reply.duration)
        if images:
            usage = msgspec.structs.replace(usage or Usage(), images=images)
        model = name_in(reply.model)
        service_tier = name_in(reply.service_tier) if reply.service_tier else ""
        if meter not in IDENTIFIED:
            return Reading(usage, model, service_tier, is_complete, has_failed=has_failed(reply))
        is_stored = meter in _STORED
        return Reading(
            None if is_stored else usage,
            model,
            service_tier,
            is_complete,
            name_in(reply.id),
            usage if is_stored and is_settled(reply) else None,
            bytes(reply.background) == b"true" or name_in(reply.object) == RUN,
            has_failed(reply),
        )


class _Ends:
    """The beginning and the end of a long answer, and what was counted between."""

    def __init__(self, begun: bytes, max_sample_bytes: int, meter: Meter) -> None:
        self.images = 0
        self.sampler = Sampler(max_sample_bytes)
        self._head = begun[:_HEAD_BYTES].removeprefix(_BOM)
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._counter = _ImageCounter() if meter is Meter.IMAGES else None
        self._between = _Between() if meter in _OF_ONE_USAGE else None
        self.feed(begun)

    def feed(self, chunk: bytes) -> None:
        self.sampler.add(chunk)
        if self._counter is not None:
            self.images = self._counter.feed(chunk)
        if self._between is not None:
            self._between.feed(chunk)
        chunk = chunk[-_TAIL_BYTES:]
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail_bytes - len(self._tail[0]) >= _TAIL_BYTES:
            self._tail_bytes -= len(self._tail.popleft())

    def members(self, *, is_whole: bool) -> dict[str, bytes]:
        members, _ = first_members(self._head)
        if not is_whole:
            return members
        between = self._between.members() if self._between is not None else {}
        return between | members | members_at_end(b"".join(self._tail))

    def is_closed(self) -> bool:
        return b"".join(self._tail).rstrip().endswith(b"}")


class _Between:
    """The last usage in an answer, wherever it stands. Text cannot pass for it: there, its quotes are escaped."""

    def __init__(self) -> None:
        self._begun = b""
        self._border = b""

    def feed(self, chunk: bytes) -> None:
        at = (self._border + chunk).rfind(_USAGE)
        if at >= 0:
            self._begun = (self._border + chunk)[at : at + _MOST_USAGE_BYTES]
        elif self._begun:
            self._begun += chunk[: _MOST_USAGE_BYTES - len(self._begun)]
        self._border = (self._border + chunk)[1 - len(_USAGE) :]

    def members(self) -> dict[str, bytes]:
        members, _ = first_members(b"{" + self._begun)
        return {name: value for name, value in members.items() if name == "usage"}


class _ImageCounter:
    """Counts the images in an answer by the member that each of them has, `b64_json` or `url`."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_IMAGE_NAMES, 0)
        self._border = b""

    def feed(self, chunk: bytes) -> int:
        """Return how many there have been."""
        text = self._border + chunk
        last = len(text)
        at = text.find(b'"')
        # Quotes are few between megabytes of base64, and one byte is found much faster than a name.
        while at >= 0:
            for name in self._counts:
                if text.startswith(name, at):
                    self._counts[name] += 1
            last = at
            at = text.find(b'"', at + 1)
        rest = text[last : last + _LONGEST_NAME]
        self._border = rest if any(name.startswith(rest) and name != rest for name in self._counts) else b""
        return max(self._counts.values())


def _elements(data: msgspec.Raw) -> int:
    try:
        return len(elements_in(data))
    except UNREADABLE:
        return 0
