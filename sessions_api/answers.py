"""The upstream's answer to one turn: collected from what the relay sends, handed on piece by piece if it streams."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gateway import headers as wire
from gateway.asgi import Message as AsgiMessage
from gateway.errors import UpstreamProtocolError
from proxysite.envelope import Message, ProError
from sessions_api import wording
from sessions_api.context import estimated_tokens

MOST_ANSWER_BYTES = 4 << 20
_ERROR_MESSAGE_MAX_CHARS = 2000
# Of the gateway's own failures inside a stream, whose head was 200; all others are the upstream's.
_CUT_STATUS = {"upstream_timeout": 504, "gateway_restarting": 503}
_PASSED = (b"x-request-id", b"retry-after", b"retry-after-ms", b"x-should-retry")
_PASSED_PREFIX = b"x-ratelimit-"

OnPiece = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, and the tokens that saying it again upstream will cost."""

    text: str
    tokens: int


class RefusedError(ProError):
    """The upstream, or the gateway, gave no answer; `headers` are the upstream's that a client may act on."""

    def __init__(self, status: int, message: Message, *, headers: wire.RawHeaders) -> None:
        super().__init__(status, message)
        self.headers = headers


class Collector:
    """An ASGI `send` for the relay. `on_piece` gets each piece of a streamed answer as soon as it is whole.

    Whether it streams is the upstream's to say, whatever it was asked: `is_stream`.
    """

    def __init__(self, on_piece: OnPiece | None) -> None:
        self.status = 0
        self.headers: wire.RawHeaders = []
        self.was_cut = False
        self._is_upstreams = False
        self._on_piece = on_piece
        self.is_stream = False
        self._received_bytes = 0
        self._body = bytearray()
        self._events = _Events()

    async def send(self, message: AsgiMessage) -> None:
        """Take one message. Raises UpstreamProtocolError on an answer too large to be remembered."""
        if message["type"] == "http.response.start":
            self._start(message)
            return
        if message["type"] != "http.response.body":
            return
        part = message.get("body", b"")
        self._received_bytes += len(part)
        if self._received_bytes > MOST_ANSWER_BYTES:
            raise UpstreamProtocolError("The upstream's answer is too large.")
        if self.is_stream:
            piece = self._events.feed(part)
            if piece and self._on_piece is not None:
                await self._on_piece(piece)
        else:
            self._body += part

    def _start(self, message: AsgiMessage) -> None:
        self.status = message["status"]
        content_type = b""
        for name, value in message["headers"]:
            lower = name.lower()
            if lower == b"content-type":
                content_type = value.lower()
            elif lower in _PASSED or lower.startswith(_PASSED_PREFIX):
                self.headers.append((lower, value))
            # The relay's word on how long the upstream took: on what has passed, and on nothing of its own.
            self._is_upstreams = self._is_upstreams or lower == b"server-timing"
        self.is_stream = 200 <= self.status < 300 and content_type.startswith(b"text/event-stream")

    def answer(self) -> Answer:
        """Return the whole answer, once the relay has ended. Raises ProError where there is none."""
        if self._received_bytes > MOST_ANSWER_BYTES:
            raise ProError(502, wording.ANSWER_TOO_LARGE)
        if not 200 <= self.status < 300:
            raise self._refusal()
        if self.is_stream:
            return self._events.answer(was_cut=self.was_cut)
        if self.was_cut:
            raise ProError(502, wording.UPSTREAM_CUT)
        completion = _object(_parsed(bytes(self._body)))
        choice = _first_choice(completion)
        if choice is None:
            raise ProError(502, wording.UPSTREAM_SILENT)
        message = _object(choice.get("message"))
        text = _joined_halves(_text_in(message))
        return Answer(text, _tokens_of(text, completion.get("usage")))

    def _refusal(self) -> ProError:
        status = self.status if 400 <= self.status <= 599 else 502
        message = wording.refused_with(self.status)
        if not self.was_cut:
            error = _object(_parsed(bytes(self._body))).get("error")
            message = _error_message(error, is_upstreams=self._is_upstreams) or message
        return RefusedError(status, message, headers=self.headers)


class _Events:
    """The server-sent events of a streamed chat completion."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._pieces: list[str] = []
        self._half = ""
        self._usage: object = None
        self._error: object = None
        self._has_ended = False

    def feed(self, part: bytes) -> str:
        """Return what the model said in the events that this part of the stream completes, "" if nothing."""
        lines = (self._line + part).splitlines(keepends=True)
        self._line = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        said = "".join([self._take_line(line.rstrip(b"\r\n")) for line in lines])
        said, self._half = _whole_pairs(self._half + said)
        piece = _joined_halves(said)
        if piece:
            self._pieces.append(piece)
        return piece

    def _take_line(self, line: bytes) -> str:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            return ""
        if line or not self._data:
            return ""
        data = b"\n".join(self._data)
        self._data.clear()
        return self._take_event(data)

    def _take_event(self, data: bytes) -> str:
        if data == b"[DONE]":
            self._has_ended = True
            return ""
        chunk = _object(_parsed(data))
        if chunk.get("error"):
            self._error = chunk["error"]
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        choice = _first_choice(chunk)
        if choice is None:
            return ""
        if choice.get("finish_reason"):
            self._has_ended = True
        return _text_in(_object(choice.get("delta")))

    def answer(self, *, was_cut: bool) -> Answer:
        if self._error is not None:
            code = str(_object(self._error).get("code"))
            raise ProError(_CUT_STATUS.get(code, 502), _error_message(self._error) or wording.UPSTREAM_CUT)
        if was_cut or not self._has_ended:
            raise ProError(502, wording.UPSTREAM_CUT)
        text = "".join(self._pieces)
        return Answer(text, _tokens_of(text, self._usage))


def _parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _first_choice(completion: dict[str, Any]) -> dict[str, Any] | None:
    choices = completion.get("choices")
    if not isinstance(choices, list):
        return None
    first = [choice for choice in choices if isinstance(choice, dict) and choice.get("index", 0) == 0]
    return first[0] if first else None


def _text_in(message: dict[str, Any]) -> str:
    """Return what a message, or a piece of one, says; a model that refuses says so elsewhere."""
    for name in ("content", "refusal"):
        text = message.get(name)
        if isinstance(text, str) and text:
            return text
    return ""


def _tokens_of(text: str, usage: object) -> int:
    """Return the tokens of an answer as the upstream reports them, those of reasoning excepted, else an estimate."""
    counts = _object(usage)
    completion = counts.get("completion_tokens")
    reasoning = _object(counts.get("completion_tokens_details")).get("reasoning_tokens") or 0
    if isinstance(completion, int) and isinstance(reasoning, int) and 0 <= completion - reasoning < 1 << 31:
        return completion - reasoning
    return estimated_tokens(text)


def _error_message(error: object, *, is_upstreams: bool = True) -> Message | None:
    """Return what an error in OpenAI's form says, in both languages if it is the gateway's own."""
    fields = _object(error)
    code = str(fields.get("code"))
    own = wording.GATEWAY.get(code)
    if own is not None:
        return own
    text = error if isinstance(error, str) else fields.get("message")
    if not isinstance(text, str) or not text:
        return None
    text = _joined_halves(text[:_ERROR_MESSAGE_MAX_CHARS])
    return Message(text if is_upstreams else wording.GATEWAY_LIMITS.get(code, text), text)


# A character beyond U+FFFF may arrive as two escapes, each half in an event of its own.


def _whole_pairs(text: str) -> tuple[str, str]:
    """Return the text and the first half of a surrogate pair at its end, "" if there is none."""
    if text and "\ud800" <= text[-1] <= "\udbff":
        return text[:-1], text[-1]
    return text, ""


def _joined_halves(text: str) -> str:
    """Return the text with surrogate pairs made characters; halves alone become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
