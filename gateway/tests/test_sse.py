from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import EventAligner

STREAM = 'data: {"你": "好😀"}\n\ndata: a\r\n\r\nevent: x\rdata: b\r\r: ping\n\n'.encode()
EVENT_ENDS = (b"\n\n", b"\n\r\n", b"\n\r", b"\r\r", b"\r\r\n")


def pieces(stream: bytes, cuts: list[int], max_waiting_bytes: int = 1 << 20) -> tuple[list[bytes], bytes]:
    aligner = EventAligner(max_waiting_bytes)
    borders = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    out = [aligner.feed(stream[a:b]) for a, b in itertools.pairwise(borders)]
    return [piece for piece in out if piece], aligner.flush()


@given(st.lists(st.integers(0, 200), max_size=20))
def test_every_piece_ends_with_an_event_wherever_the_network_cuts(cuts: list[int]) -> None:
    out, rest = pieces(STREAM, cuts)
    assert b"".join(out) + rest == STREAM
    assert rest == b""
    # An LF by itself belongs to the CR that went out before it.
    assert all(piece.endswith(EVENT_ENDS) or piece == b"\n" for piece in out)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=20), st.integers(1, 50))
def test_no_byte_is_lost_added_or_moved(stream: bytes, cuts: list[int], bound: int) -> None:
    out, rest = pieces(stream, cuts, bound)
    assert b"".join(out) + rest == stream


def test_an_event_leaves_the_moment_it_is_complete() -> None:
    aligner = EventAligner(1 << 20)
    assert aligner.feed(b"data: 1\n") == b""
    assert aligner.feed(b"\ndata: 2\n\nda") == b"data: 1\n\ndata: 2\n\n"
    assert aligner.feed(b"ta: 3\r\n\r") == b"data: 3\r\n\r"
    assert aligner.feed(b"\n") == b"\n"


@pytest.mark.parametrize("first", [b"\n", b"\r", b"\r\n"])
@pytest.mark.parametrize("second", [b"\n", b"\r", b"\r\n"])
def test_any_two_line_ends_in_a_row_end_an_event(first: bytes, second: bytes) -> None:
    if first + second == b"\r\n":
        return  # is one
    event = b"data: 1" + first + second
    assert EventAligner(1 << 20).feed(event) == event
    aligner = EventAligner(1 << 20)
    assert aligner.feed(event + b"data: 2") == event
    parts = [EventAligner.feed(aligner, bytes([byte])) for byte in b"\n\n" + event]
    assert b"".join(parts) == b"data: 2\n\n" + event


def test_a_part_of_an_event_waits_until_the_stream_ends() -> None:
    aligner = EventAligner(1 << 20)
    assert aligner.feed(b"data: 1\n\ndata: {") == b"data: 1\n\n"
    assert aligner.flush() == b"data: {"
    assert aligner.flush() == b""


def test_an_event_beyond_the_bound_goes_out_in_parts_of_whole_characters() -> None:
    aligner = EventAligner(10)
    character = "好".encode()
    part = aligner.feed(b"data: " + character * 2 + character[:2])
    assert part.decode() == "data: 好好"
    assert aligner.feed(character[2:] + b"\n\n").decode() == "好\n\n"


@pytest.mark.parametrize("end", EVENT_ENDS)
def test_the_end_of_such_an_event_is_seen_wherever_the_bound_falls(end: bytes) -> None:
    for bound in range(4, 12):
        event = b"data: 1" + end
        aligner = EventAligner(bound)
        sent = [aligner.feed(event[at : at + 1]) for at in range(len(event))]
        assert b"".join(sent) == event
        assert not aligner.is_inside_event
        assert aligner.feed(b"data: 2" + end) == b"data: 2" + end


@given(st.integers(0, 3), st.integers(1, 60), st.lists(st.integers(0, 120), max_size=6), st.integers(1, 40))
def test_who_ends_inside_an_event_is_known_to_however_much_of_it_has_gone_out(
    whole: int, size: int, cuts: list[int], bound: int
) -> None:
    aligner = EventAligner(bound)
    stream = b"data: 1\n\n" * whole + b"x" * size
    for start, end in itertools.pairwise([0, *sorted(cuts), len(stream) + 120]):
        aligner.feed(stream[start:end])
    assert aligner.is_inside_event
    aligner.feed(b"\n\n")
    assert not aligner.is_inside_event


@pytest.mark.parametrize("size", [10_000, 2_000_000])
def test_the_cost_of_an_event_in_many_parts_grows_with_its_size_only(size: int) -> None:
    aligner = EventAligner(size * 2)
    sent = [aligner.feed(b"x" * 1000) for _ in range(size // 1000)]
    assert not any(sent)
    assert len(aligner.feed(b"\n\n")) == size + 2
