"""What an upstream said, in part, for an estimate where it reported no usage. Pure."""

from __future__ import annotations

import json
import re

import msgspec

from gateway.endpoints import Meter

# Base64, which no model reads or writes as text; no word is as long, and nothing before it belongs to it.
DATA = re.compile(rb"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_=-]{256,}")
_VALUE = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)'
_CHAT = rb'"(?:content|reasoning_content|reasoning|refusal|arguments|name)' + _VALUE


def _pattern(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


# Which strings of an answer a model wrote. In events only the pieces: the closing events say everything again.
_IN_EVENTS = {
    Meter.CHAT: _pattern(_CHAT),
    Meter.COMPLETIONS: _pattern(rb'"text' + _VALUE),
    Meter.RESPONSES: _pattern(rb'"delta' + _VALUE),
    Meter.TRANSCRIPTION: _pattern(rb'"delta' + _VALUE),
    Meter.RUNS: _pattern(rb'"(?:value|arguments)' + _VALUE),
    Meter.OTHER: _pattern(rb'"(?:delta|content|text)' + _VALUE),
}
_IN_JSON = {
    Meter.CHAT: _pattern(_CHAT),
    Meter.COMPLETIONS: _pattern(rb'"text' + _VALUE),
    Meter.RESPONSES: _pattern(rb'"(?:text|arguments|refusal)' + _VALUE),
    Meter.TRANSCRIPTION: _pattern(rb'"text' + _VALUE),
    Meter.OTHER: _pattern(rb'"(?:content|text)' + _VALUE),
}


class OutputSample(msgspec.Struct, frozen=True):
    """Text that the model wrote, from the first `kept_bytes` of `seen_bytes` of its answer.

    Whoever estimates tokens multiplies those of `text` by `seen_bytes / kept_bytes`.
    """

    text: str = ""
    seen_bytes: int = 0
    kept_bytes: int = 0


class Sampler:
    """Keeps the beginning of an answer until it is known not to be needed."""

    __slots__ = ("_kept", "_max_bytes", "kept_bytes", "seen_bytes")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: list[bytes] = []
        self.kept_bytes = 0
        self.seen_bytes = 0

    def add(self, piece: bytes) -> None:
        size = len(piece)
        self.seen_bytes += size
        if self.kept_bytes < self._max_bytes:
            if self.kept_bytes + size > self._max_bytes:
                piece = piece[: self._max_bytes - self.kept_bytes]
            self._kept.append(piece)
            self.kept_bytes += len(piece)

    def skip(self, skipped_bytes: int) -> None:
        self.seen_bytes += skipped_bytes

    def sample(self, meter: Meter, *, of_events: bool) -> OutputSample:
        pattern = (_IN_EVENTS if of_events else _IN_JSON).get(meter)
        text = _joined(pattern.findall(b"".join(self._kept))) if pattern else ""
        return OutputSample(text, self.seen_bytes, self.kept_bytes)


def _joined(strings: list[bytes]) -> str:
    """Return the text of strings as they stand in JSON, between their quotes."""
    text = "".join(_unescaped(string) if b"\\" in string else string.decode("utf-8", "replace") for string in strings)
    # An emoji may have been cut into two events: halves that meet become one, halves alone become U+FFFD.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unescaped(string: bytes) -> str:
    try:
        text: str = json.loads(b'"%s"' % string, strict=False)
    except ValueError:
        return string.decode("utf-8", "replace")
    return text
