"""Files of usage events on their way to the ledger: this process's own, and those of dead ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gateway import segments
from gateway.delivery import BATCH_EVENTS, Delivery
from gateway.segments import Batch, Segment

logger = logging.getLogger("gateway.journal")

ADOPTION_INTERVAL_S = 5.0
_SEGMENTS_HELD = 16


class Backlog:
    """The files that `delivery` is given, oldest first; for one thread, while others may look at `segments`.

    `corrupt` lines were damaged on disk, `set_aside` ones are refused whatever else works, `lost` ones could not even
    be set aside. `on_error` is told of a disk that fails.
    """

    def __init__(
        self,
        directory: Path,
        *,
        delivery: Delivery,
        clock: Callable[[], float],
        on_error: Callable[[OSError], None],
    ) -> None:
        self.segments: tuple[Segment, ...] = ()  # replaced, not changed
        self.corrupt = self.set_aside = self.lost = 0
        self._directory = directory
        self._delivery = delivery
        self._clock = clock
        self._on_error = on_error
        self._adopt_at = 0.0

    def add(self, segment: Segment) -> None:
        self.segments = (*self.segments, segment)

    def _drop_first(self) -> Segment:
        first, *rest = self.segments
        self.segments = tuple(rest)
        return first

    def adopt(self, *, at_once: bool = False) -> None:
        """Take over files whose process is dead, now and then; a few at a time, so that all processes take a share."""
        if not at_once and (self._clock() < self._adopt_at or len(self.segments) >= _SEGMENTS_HELD):
            return
        self._adopt_at = self._clock() + ADOPTION_INTERVAL_S
        ours = {segment.path for segment in self.segments}
        try:
            found = segments.survey(self._directory)
        except FileNotFoundError:
            return
        except OSError as exc:
            self._on_error(exc)
            return
        for report in found:
            if len(self.segments) >= _SEGMENTS_HELD:
                self._adopt_at = 0.0  # there is more
                return
            if report.path in ours:
                continue
            try:
                segment = Segment.adopt(report.path)
            except OSError:  # its owner lives, it is gone, or it is not ours to open: `journal status` shows it
                continue
            if segment.size_bytes:
                logger.info("adopted %s: %d bytes", report.path.name, segment.size_bytes)
            self.add(segment)

    def record(self, *, until: float) -> None:
        """Bring the files to the ledger, oldest first, and remove each once all of it is recorded."""
        delivery = self._delivery
        while self.segments and self._clock() < until and delivery.is_due:
            segment = self.segments[0]
            try:
                batch = segment.read(delivery.batch_events, offset=segment.offset)
            except OSError as exc:
                self._on_error(exc)
                self._drop_first().close()  # to be adopted again, by us or another
                return
            if batch is None:
                self._drop_first().remove()
            elif not batch.lines:
                self._finish(segment, batch, corrupt=batch.corrupt)
            elif (taken := delivery.give(batch.lines)) is not None:
                self._finish(segment, batch, corrupt=taken.corrupt)
                self.put_aside(taken.unreadable)
            elif delivery.refuses(batch.lines, others=partial(self._behind, segment, batch)):
                self.put_aside([batch.lines])
                self._finish(segment, batch, corrupt=0)

    def _finish(self, segment: Segment, batch: Batch, *, corrupt: int) -> None:
        segment.offset = batch.next_offset
        if corrupt:
            self.corrupt += corrupt
            logger.error("%s: %d damaged lines were skipped", segment.path.name, corrupt)

    def _behind(self, segment: Segment, batch: Batch) -> bytes:
        """Return a line with an event that comes after a batch, if there is one."""
        places = [(segment, batch.next_offset), *((other, other.offset) for other in self.segments[1:2])]
        for place, offset in places:
            following = place.read(BATCH_EVENTS, offset=offset)
            if following is not None and (line := segments.first_readable(following.lines)):
                return line
        return b""

    def put_aside(self, lines: Sequence[bytes]) -> None:
        """Keep what the ledger refuses where somebody may look at it."""
        if not lines:
            return
        self.set_aside += len(lines)
        try:
            segments.set_aside(self._directory, lines)
        except OSError as exc:
            self._on_error(exc)
            self.lost += len(lines)
        else:
            logger.error("%d usage events were set aside in %s", len(lines), segments.SET_ASIDE_NAME)

    def release(self) -> None:
        """Let go of the files: what stands in them is left to whoever adopts it."""
        while self.segments:
            segment = self._drop_first()
            segment.close() if segment.size_bytes else segment.remove()
