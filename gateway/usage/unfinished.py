"""Responses on a WebSocket that have begun and not ended: what is known of them, for an estimate. Pure."""

from __future__ import annotations

from msgspec import Struct

from gateway.endpoints import Meter
from gateway.usage.sample import DATA, OutputSample, Sampler

_MOST_PROMPT_BYTES = 32 << 10
_MOST_OUTPUT_BYTES = 16 << 10
_MOST_OPEN = 64
# A realtime response that says none of these answers what was said before.
_PROMPTS, _NESTED = (b'"input"', b'"instructions"', b'"prompt"'), b'"response"'


class UnfinishedResponse(Struct, frozen=True):
    """What was asked for and written, as far as it was kept: `prompt` is JSON, or the beginning of some.

    Whoever estimates the prompt's tokens multiplies those of `prompt` by `seen_bytes / kept_bytes`. `is_speech`: what
    was written is audio and has no transcript.
    """

    model: str = ""
    service_tier: str = ""
    prompt: bytes = b""
    seen_bytes: int = 0
    kept_bytes: int = 0
    output: OutputSample = OutputSample()
    is_speech: bool = False


class Unfinished:
    """The responses in progress on one socket, those that overlap together. Holds 80 KiB at most.

    Of a conversation's items, which each later response reads again, the first are kept for all of the session.
    """

    def __init__(self) -> None:
        self.has_written = self._has_spoken = False
        self._items = _Kept(_MOST_PROMPT_BYTES)
        self._requests = _Kept(_MOST_PROMPT_BYTES)
        self._output = Sampler(_MOST_OUTPUT_BYTES)
        self._begun: dict[str, None] = {}
        self._asked = 0
        self._model = self._service_tier = ""

    @property
    def has_begun(self) -> bool:
        """Whether the upstream has said anything of a response that it has not ended."""
        return bool(self._begun) or self.has_written

    @property
    def is_asked_for(self) -> bool:
        """Whether the client waits for a response, begun or not."""
        return self.has_begun or self._asked > 0

    # Client to upstream

    def add_item(self, message: str | bytes) -> None:
        self._items.add(message)

    def ask(self, message: str | bytes) -> None:
        self._asked = min(self._asked + 1, _MOST_OPEN)
        self._requests.add(message)

    # Upstream to client

    def refuse(self) -> None:
        """Take an error: what was asked for last does not begin."""
        if self._asked and not self.has_begun:
            self._asked -= 1
            self._forget_if_quiet()

    def begin(self, identity: str, *, model: str, service_tier: str) -> None:
        self._asked = max(self._asked - 1, 0)
        self._model, self._service_tier = model or self._model, service_tier or self._service_tier
        if len(self._begun) < _MOST_OPEN:
            self._begun[identity] = None

    def write(self, piece: str | bytes) -> None:
        """Take a piece of text."""
        self.has_written = True
        output = self._output
        if output.kept_bytes < _MOST_OUTPUT_BYTES:
            output.add(piece.encode("utf-8", "replace") if isinstance(piece, str) else piece)
        else:
            output.skip(len(piece))

    def speak(self) -> None:
        """Take a piece of audio, of which nothing can be counted."""
        self.has_written = self._has_spoken = True

    def end(self, identity: str) -> None:
        """Take the end of a response whose usage is known, or of which nothing was written."""
        if identity in self._begun:
            del self._begun[identity]
        elif self._begun:
            del self._begun[next(iter(self._begun))]
        else:
            self._asked = max(self._asked - 1, 0)
        self._forget_if_quiet()

    def take(self) -> UnfinishedResponse:
        """Return what is known of all that is in progress, and forget it."""
        prompt = self._prompt()
        seen = self._items.seen_bytes + self._requests.seen_bytes
        kept = self._items.kept_bytes + self._requests.kept_bytes
        bare = DATA.sub(b"", prompt)
        if len(bare) < len(prompt):
            kept = seen  # what was left out is data, most likely
        output = self._output.sample(Meter.RESPONSES, of_events=True)
        is_speech = self._has_spoken and not output.text
        found = UnfinishedResponse(self._model, self._service_tier, bare, seen, kept, output, is_speech)
        self._begun.clear()
        self._asked = 0
        self._forget_if_quiet()
        return found

    def _prompt(self) -> bytes:
        requests = [part for part in self._requests.parts if any(name in part for name in _PROMPTS)]
        parts = [*self._items.parts, *requests]
        if len(parts) == len(requests) == 1 and _NESTED not in parts[0]:
            return parts[0]  # of responses over a socket: the same as the body of a request
        return b'{"input":[%s]}' % b",".join(parts) if parts else b""

    def _forget_if_quiet(self) -> None:
        if self._begun or self._asked:
            return
        self.has_written = self._has_spoken = False
        self._model = self._service_tier = ""
        if self._requests.parts:
            self._requests = _Kept(_MOST_PROMPT_BYTES)
        if self._output.seen_bytes:
            self._output = Sampler(_MOST_OUTPUT_BYTES)


class _Kept:
    """The beginning of what was sent, in messages."""

    def __init__(self, most_bytes: int) -> None:
        self._room = most_bytes
        self.parts: list[bytes] = []
        self.seen_bytes = self.kept_bytes = 0

    def add(self, message: str | bytes) -> None:
        self.seen_bytes += len(message)
        if self._room <= 0:
            return
        cut = message[: self._room]
        part = cut.encode("utf-8", "replace")[: self._room] if isinstance(cut, str) else cut
        self.parts.append(part)
        self._room -= len(part)
        self.kept_bytes += len(cut)
