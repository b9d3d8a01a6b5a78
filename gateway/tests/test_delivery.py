"""A ledger that is away, and an event that it will never take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from gateway.delivery import BATCH_EVENTS, Delivery
from gateway.segments import Reading, encode_line, read_lines
from gateway.tests.test_segments import usage_event


@dataclass(frozen=True)
class Outcome:
    recorded: int
    duplicates: int = 0
    rejected: int = 0
    corrupt: int = 0
    unreadable: Sequence[bytes] = ()

    @classmethod
    def of(cls, reading: Reading, *, recorded: int) -> Outcome:
        """Return what a sink says that has recorded so many of what it read, the others being duplicates."""
        duplicates = len(reading.events) - recorded
        return cls(recorded, duplicates, corrupt=reading.corrupt, unreadable=reading.unreadable)


class Away:
    """A sink that fails while `is_away`, and always for the events named in `refused`."""

    def __init__(self, *refused: str) -> None:
        self.is_away = False
        self.refused = set(refused)
        self.calls: list[list[str]] = []

    def __call__(self, lines: bytes) -> Outcome:
        reading = read_lines(lines)
        ids = [event.id for event in reading.events]
        self.calls.append(ids)
        if ids and (self.is_away or self.refused & set(ids)):
            raise ConnectionError("away")
        return Outcome.of(reading, recorded=len(ids))


LINE, OTHER_LINE = encode_line(usage_event(1)), encode_line(usage_event(2))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_to_ten_seconds_and_end_with_the_first_success() -> None:
    sink, clock = Away(), Clock()
    delivery = Delivery(sink, clock=clock)
    sink.is_away = True
    pauses = []
    for _ in range(8):
        assert not delivery.give(LINE)
        since = clock.now
        while not delivery.is_due:
            clock.now += 0.25
        pauses.append(clock.now - since)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    sink.is_away = False
    assert delivery.give(LINE)
    assert delivery.is_due
    assert not delivery.is_failing


def test_the_alarm_waits_ten_seconds_and_names_what_failed() -> None:
    sink, clock = Away(), Clock()
    delivery = Delivery(sink, clock=clock)
    sink.is_away = True
    delivery.give(LINE)
    clock.now += 9
    assert delivery.alarm() == ""
    clock.now += 1
    assert "ConnectionError" in delivery.alarm()
    sink.is_away = False
    delivery.give(LINE)
    assert delivery.alarm() == ""


def test_failures_make_batches_small_and_successes_large_again() -> None:
    sink = Away()
    delivery = Delivery(sink, clock=Clock())
    sink.is_away = True
    for _ in range(12):
        delivery.give(LINE)
    assert delivery.batch_events == 1
    sink.is_away = False
    for _ in range(12):
        delivery.give(LINE)
    assert delivery.batch_events == BATCH_EVENTS


def test_an_event_is_refused_only_when_others_are_taken_meanwhile() -> None:
    bad, good = LINE, OTHER_LINE
    sink = Away(usage_event(1).id)
    delivery = Delivery(sink, clock=Clock())
    for _ in range(9):
        delivery.give(bad)
        assert not delivery.refuses(bad, others=lambda: good)
    delivery.give(bad)
    sink.is_away = True
    assert not delivery.refuses(bad, others=lambda: good)
    sink.is_away = False
    assert not delivery.refuses(bad, others=bytes)
    assert delivery.refuses(bad, others=lambda: good)
    assert not delivery.is_failing


def test_a_ledger_that_comes_back_just_now_refuses_nothing() -> None:
    sink = Away()
    delivery = Delivery(sink, clock=Clock())
    sink.is_away = True
    for _ in range(10):
        delivery.give(LINE)
    sink.is_away = False
    assert not delivery.refuses(LINE, others=lambda: OTHER_LINE)
    assert [usage_event(1).id] in sink.calls[-1:]


@pytest.mark.parametrize("line", [b"damaged\n", encode_line(usage_event(3, outcome="eaten_by_a_dog"))])
def test_lines_without_an_event_prove_nothing_of_a_ledger_that_is_away(line: bytes) -> None:
    sink = Away()
    delivery = Delivery(sink, clock=Clock())
    sink.is_away = True
    for _ in range(10):
        delivery.give(LINE)
        assert delivery.give(line)
    assert delivery.is_failing
    assert delivery.batch_events == 1
    assert not delivery.refuses(LINE, others=lambda: line)


def test_several_lines_are_never_refused_together() -> None:
    sink = Away(usage_event(1).id)
    delivery = Delivery(sink, clock=Clock())
    for _ in range(10):
        delivery.give(LINE)
    assert not delivery.refuses(LINE + LINE, others=lambda: OTHER_LINE)
