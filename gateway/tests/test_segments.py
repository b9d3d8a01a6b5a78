"""The files of the journal: what survives of them, and whose they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.events import Usage, UsageEvent
from gateway import segments
from gateway.segments import Segment, TakenError, decode_line, encode_line, is_whole, read_lines


def usage_event(number: int, **fields: object) -> UsageEvent:
    values = {
        "started_at": 1_750_000_000.0 + number,
        "model": "gpt-4o-mini",
        "usage": Usage(input_tokens=number),
        **fields,
    }
    return UsageEvent(id=f"{number:032x}", **values)  # type: ignore[arg-type]


def plain(event: UsageEvent) -> UsageEvent:
    """Return an equal one of the type itself."""
    again = decode_line(encode_line(event)[:-1])
    assert again is not None
    return again


def read_all(segment: Segment, most_events: int = 500) -> tuple[list[UsageEvent], int]:
    events, corrupt, offset = [], 0, 0
    while (batch := segment.read(most_events, offset=offset)) is not None:
        assert batch.lines.count(b"\n") <= most_events
        assert batch.next_offset > offset
        reading = read_lines(batch.lines)
        events += map(plain, reading.events)
        corrupt += batch.corrupt + reading.corrupt + len(reading.unreadable)
        offset = batch.next_offset
    return events, corrupt


def test_an_event_comes_back_as_it_was() -> None:
    event = usage_event(7, model="модель\n\u2028x", upstream_request_id='"\\')
    line = encode_line(event)
    assert line.count(b"\n") == 1
    assert is_whole(line[:-1])
    assert decode_line(line[:-1]) == event


def test_a_text_that_no_encoding_takes_is_written_without_it() -> None:
    line = encode_line(usage_event(1, model="gpt-\ud800"))
    event = decode_line(line[:-1])
    assert event is not None
    assert event.model == "gpt-?"


def test_a_line_has_a_bounded_length() -> None:
    assert len(encode_line(usage_event(1, model="\x00" * 1_000_000))) < segments.LINE_MAX_BYTES


def test_a_file_cut_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    lines = [encode_line(usage_event(number)) for number in range(4)]
    content = b"".join(lines)
    ends = [sum(map(len, lines[: count + 1])) for count in range(len(lines))]
    path = tmp_path / "x.journal"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        segment = Segment.adopt(path)
        events, corrupt = read_all(segment)
        segment.close()
        assert events == [usage_event(number) for number, end in enumerate(ends) if end <= cut]
        assert corrupt == (0 if cut in (0, *ends) else 1)


@given(
    parts=st.lists(st.one_of(st.integers(0, 1000), st.binary(max_size=40)), max_size=12),
    flip=st.tuples(st.integers(0, 10**6), st.integers(1, 255)),
    most_events=st.integers(1, 5),
)
def test_damage_costs_only_the_lines_it_touches(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[int | bytes],
    flip: tuple[int, int],
    most_events: int,
) -> None:
    lines = [encode_line(usage_event(part)) if isinstance(part, int) else part + b"\n" for part in parts]
    content = bytearray(b"".join(lines))
    touched = None
    if content:
        place = flip[0] % len(content)
        content[place] ^= flip[1]
        touched = bytes(content)
    path = tmp_path_factory.mktemp("damage") / "x.journal"
    path.write_bytes(content)
    segment = Segment.adopt(path)
    events, _ = read_all(segment, most_events)
    segment.close()
    survivors = [] if touched is None else [line for line in touched.split(b"\n") if is_whole(line)]
    assert events == [event for event in map(decode_line, survivors) if event is not None]
    # A flipped bit ends one line, or, being its end, two.
    assert len(events) >= sum(isinstance(part, int) for part in parts) - 2


def test_garbage_without_a_line_in_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    path.write_bytes(b"\x00" * 3_000_000 + b"\n" + encode_line(usage_event(1)))
    segment = Segment.adopt(path)
    events, corrupt = read_all(segment)
    assert events == [usage_event(1)]
    assert corrupt >= 1
    segment.close()


def test_lines_of_other_versions_are_told_from_damaged_ones() -> None:
    good, other = encode_line(usage_event(1)), encode_line(usage_event(2, outcome="eaten_by_a_dog"))
    short = encode_line(usage_event(3))[:5] + b"\n"
    shifted = b"0" + encode_line(usage_event(4))
    reading = read_lines(good + other + short + shifted + b"\n" + good)
    assert list(map(plain, reading.events)) == [usage_event(1)] * 2
    assert reading.unreadable == [other]
    assert reading.corrupt == 3


def test_the_first_line_with_an_event_is_found_behind_others() -> None:
    other = encode_line(usage_event(2, outcome="eaten_by_a_dog"))
    lines = [b"damaged\n", other, encode_line(usage_event(1)), encode_line(usage_event(3))]
    assert segments.first_readable(b"".join(lines)) == lines[2]
    assert segments.first_readable(b"".join(lines[:2])) == b""


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path / "x.journal")
    assert (tmp_path / "x.journal").stat().st_mode & 0o777 == 0o600
    segment.close()
    segments.set_aside(tmp_path, [b"x\n"])
    assert (tmp_path / segments.SET_ASIDE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_file_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    owner = Segment.create(path)
    assert segments.is_owned(path)
    with pytest.raises(TakenError):
        Segment.adopt(path)
    owner.close()
    assert not segments.is_owned(path)
    heir = Segment.adopt(path)
    assert segments.is_owned(path)
    heir.remove()
    with pytest.raises(FileNotFoundError):
        Segment.adopt(path)
    assert not segments.is_owned(path)


def test_a_file_removed_between_its_opening_and_its_lock_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    Segment.create(path).close()
    descriptor = os.open(path, os.O_RDWR)
    Segment.adopt(path).remove()
    with pytest.raises(TakenError):
        Segment._locked(path, descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_an_adopter_never_takes_what_its_maker_goes_on_to_use(tmp_path: Path) -> None:
    is_over = threading.Event()

    def adopt_and_remove() -> None:
        while not is_over.is_set():
            for report in segments.survey(tmp_path):
                try:
                    Segment.adopt(report.path).remove()
                except OSError:
                    continue

    adopters = [threading.Thread(target=adopt_and_remove) for _ in range(2)]
    for adopter in adopters:
        adopter.start()
    try:
        made = 0
        for number in range(1500):
            try:
                segment = Segment.create(tmp_path / f"{number}.journal")
            except TakenError:
                continue
            segment.append(encode_line(usage_event(number)))
            assert segment.is_linked()
            segment.remove()
            made += 1
    finally:
        is_over.set()
        for adopter in adopters:
            adopter.join()
    assert made
