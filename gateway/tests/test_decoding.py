from __future__ import annotations

import asyncio
import gzip
import importlib.util
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.decoding import READABLE_CODINGS, Decoder, unpacked
from gateway.errors import UpstreamProtocolError

TEXT = ('{"id":"chatcmpl-1","choices":[{"message":{"content":"' + "好 day 😀 " * 400 + '"}}]}').encode()


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def brotli(data: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("brotli", minversion="1.2").compress(data)
    return compressed


def zstd(data: bytes) -> bytes:
    if importlib.util.find_spec("compression"):
        compressed: bytes = pytest.importorskip("compression.zstd").compress(data)
    else:
        compressed = pytest.importorskip("backports.zstd").compress(data)
    return compressed


CODINGS = {
    b"": bytes,
    b"identity": bytes,
    b"gzip": gzip.compress,
    b"X-GZip ": gzip.compress,
    b"deflate": zlib.compress,
    b"Deflate": raw_deflate,
    b"br": brotli,
    b"zstd": zstd,
}


def decoded(decoder: Decoder, data: bytes, cut_every: int) -> bytes:
    return b"".join(decoder.feed(data[at : at + cut_every]) for at in range(0, len(data), cut_every))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("cut_every", [1, 7, 100, 1 << 20])
def test_each_coding_is_undone_wherever_the_network_cuts(coding: bytes, cut_every: int) -> None:
    data = CODINGS[coding](TEXT)
    decoder = Decoder(coding)
    assert decoded(decoder, data, cut_every) == TEXT
    assert not decoder.gave_up


@pytest.mark.parametrize("wbits", [31, 15, -15])
def test_what_is_flushed_comes_out_at_once(wbits: int) -> None:
    compressor = zlib.compressobj(wbits=wbits)
    decoder = Decoder(b"gzip" if wbits == 31 else b"deflate")
    for number in range(50):
        event = b"data: %d\n\n" % number
        assert decoder.feed(compressor.compress(event) + compressor.flush(zlib.Z_SYNC_FLUSH)) == event


@pytest.mark.parametrize("cut_every", [1, 5, 10000])
def test_gzip_members_and_padding_behind_one_another_are_one_text(cut_every: int) -> None:
    data = gzip.compress(b"one ") + gzip.compress(b"") + gzip.compress(b"two") + b"\0" * 100
    decoder = Decoder(b"gzip")
    assert decoded(decoder, data, cut_every) == b"one two"
    assert not decoder.gave_up


@pytest.mark.parametrize("size", [262143, 262144, 262145, 1 << 20, 3 << 20])
def test_output_of_any_length_comes_out_whole(size: int) -> None:
    text = (b"%d," * 3 % (7, 11, 13)) * (size // 8 + 1)
    text = text[:size]
    decoder = Decoder(b"gzip", max_ratio=1 << 20)
    assert decoder.feed(gzip.compress(text)) == text


def test_nothing_is_left_inside_when_all_input_has_been_taken() -> None:
    for size in range(262_100, 262_700, 7):
        decoder = Decoder(b"deflate", max_ratio=1 << 20)
        assert len(decoder.feed(raw_deflate(bytes(size)))) == size


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd"])
def test_a_bomb_is_given_up_soon(coding: bytes) -> None:
    data = CODINGS[coding](bytes(50 << 20))
    decoder = Decoder(coding)
    out = sum(len(decoder.feed(data[at : at + 4096])) for at in range(0, len(data), 4096))
    assert decoder.gave_up
    assert out <= (2 << 20) + 200 * len(data)
    assert decoder.feed(data) == b""


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd"])
def test_what_a_chunk_decodes_to_comes_in_small_parts(coding: bytes) -> None:
    data = CODINGS[coding](bytes(20 << 20))
    sizes = [len(part) for part in Decoder(coding, max_ratio=1 << 20).parts(data)]
    assert sum(sizes) == 20 << 20
    assert max(sizes) < 1 << 20


def test_more_than_the_limit_is_given_up() -> None:
    decoder = Decoder(b"identity", max_bytes=10)
    assert decoder.feed(b"12345") == b"12345"
    assert not decoder.gave_up
    decoder.feed(b"678901")
    assert decoder.gave_up


@pytest.mark.parametrize("coding", [b"compress", b"gzip, gzip", b"aws-chunked", b"\xff"])
def test_an_unknown_or_combined_coding_is_given_up_from_the_start(coding: bytes) -> None:
    decoder = Decoder(coding)
    assert decoder.gave_up
    assert decoder.feed(TEXT) == b""


@settings(deadline=None)
@given(st.sampled_from(sorted(READABLE_CODINGS)), st.lists(st.binary(max_size=60), max_size=6), st.integers(0, 200))
def test_garbage_is_no_exception(coding: bytes, chunks: list[bytes], cut_at: int) -> None:
    decoder = Decoder(coding)
    if coding not in (b"br", b"zstd"):
        decoder.feed(CODINGS.get(coding, gzip.compress)(TEXT)[:cut_at])
    for chunk in chunks:
        decoder.feed(chunk)


def test_what_came_before_broken_data_is_kept() -> None:
    data = gzip.compress(b"kept" * 1000)
    decoder = Decoder(b"gzip")
    out = decoder.feed(data) + decoder.feed(b"no member of gzip")
    assert out == b"kept" * 1000
    assert decoder.gave_up


async def in_parts(data: bytes, cut_every: int = 7) -> AsyncIterator[bytes]:
    for at in range(0, len(data), cut_every):
        yield data[at : at + cut_every]


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_stream_that_ends_whole_is_unpacked_whole(coding: bytes) -> None:
    data = CODINGS[coding](TEXT)
    assert b"".join([part async for part in unpacked(in_parts(data), Decoder(coding))]) == TEXT


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_stream_without_a_byte_is_whole_in_any_coding(coding: bytes) -> None:
    assert [part async for part in unpacked(in_parts(b""), Decoder(coding))] == []


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"Deflate", b"br", b"zstd"])
@pytest.mark.parametrize("missing_bytes", [1, 40])
async def test_a_stream_that_ends_before_its_coding_does_has_failed(coding: bytes, missing_bytes: int) -> None:
    data = CODINGS[coding](TEXT)[:-missing_bytes]
    with pytest.raises(UpstreamProtocolError):
        async for _ in unpacked(in_parts(data), Decoder(coding)):
            pass


async def test_others_have_their_turn_while_much_is_unpacked() -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def one_chunk() -> AsyncIterator[bytes]:
        yield gzip.compress(b" " * (8 << 20))

    others = asyncio.create_task(take_turns())
    unpacked_bytes = 0
    async for part in unpacked(one_chunk(), Decoder(b"gzip", max_ratio=2000)):
        unpacked_bytes += len(part)
    others.cancel()
    assert unpacked_bytes == 8 << 20
    assert turns >= 16
