"""Small files that are what they say they are: a PNG, a WAV. Pure."""

from __future__ import annotations

import math
import struct
import zlib
from array import array

IMAGE_PIXELS = 64
SAMPLES_PER_S = 8000


def png(seed: bytes) -> bytes:
    """Return a 64x64 PNG, a gradient between two colours that follow from the seed (at least 6 bytes)."""
    steps = [step / (2 * IMAGE_PIXELS) for step in range(2 * IMAGE_PIXELS)]
    ramp = bytes(int(seed[i] * (1 - step) + seed[i + 3] * step) for step in steps for i in range(3))
    # A pixel's colour follows from x + y, so every row is the one before, moved by a pixel. The 0 in front says
    # that the row is not filtered (PNG specification, section 9).
    rows = b"".join(b"\0" + ramp[3 * y : 3 * (y + IMAGE_PIXELS)] for y in range(IMAGE_PIXELS))
    header = struct.pack(">IIBBBBB", IMAGE_PIXELS, IMAGE_PIXELS, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in chunks)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def wav(seconds: float, seed: bytes) -> bytes:
    """Return a quiet tone as mono 16-bit PCM at 8 kHz; its pitch follows from the seed (at least 1 byte)."""
    hertz = 220 + seed[0]
    count = int(seconds * SAMPLES_PER_S)
    samples = array("h", (int(6000 * math.sin(math.tau * hertz * i / SAMPLES_PER_S)) for i in range(count)))
    content = struct.pack(f"<{count}h", *samples)
    form = struct.pack("<IHHIIHH", 16, 1, 1, SAMPLES_PER_S, SAMPLES_PER_S * 2, 2, 16)
    body = b"WAVEfmt " + form + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def seconds_of(audio: bytes) -> float:
    """Return how long the audio plays: by a WAV's header, or else as if compressed to 128 kbit/s."""
    if audio[:4] == b"RIFF" and audio[8:16] == b"WAVEfmt " and len(audio) >= 32:
        bytes_per_s = int.from_bytes(audio[28:32], "little")
        if bytes_per_s:
            return round(max(0, len(audio) - 44) / bytes_per_s, 2)
    return round(len(audio) / 16_000, 2)
