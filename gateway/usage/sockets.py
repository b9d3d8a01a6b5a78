"""Usage from the messages of a WebSocket: realtime and live sessions, and responses over a socket. Pure."""

from __future__ import annotations

import operator

import msgspec
from msgspec import Raw, Struct

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.usage.shapes import UNREADABLE, Reply, name_in, reply_in, usage_in
from gateway.usage.unfinished import Unfinished, UnfinishedResponse

_REMEMBERED_IDS = 4096
_MOST_MODELS = 16
_LOOK_FOR_KIND_IN = 160
_TRANSCRIBED = "conversation.item.input_audio_transcription.completed"
RESPONSE_ENDS = frozenset({"response.done", "response.completed", "response.incomplete", "response.failed"})
_SESSIONS = {
    "session.created",
    "session.updated",
    "session.started",
    "transcription_session.created",
    "transcription_session.updated",
}
_SECONDS = {"session.usage.updated", "session.closed"}
# Nearly all of a session's bytes. The type stands first in OpenAI's messages; elsewhere it costs a longer look.
_DELTA, _AUDIO_DELTA, _OF_RESPONSE = b'.delta"', b'audio.delta"', b'"response.'
_ITEM, _CREATE = b'"conversation.item.create"', b'"response.create"'
_counts = operator.attrgetter(*Usage.__struct_fields__)


class RealtimeReading(Struct, frozen=True):
    """What one model used on a socket since the last look.

    `is_transcription`: of the model that writes down what is said to a realtime model, which has its own price.
    """

    usage: Usage
    model: str = ""
    service_tier: str = ""
    is_transcription: bool = False


class _Transcription(Struct):
    model: Raw = Raw()


class _AudioInput(Struct):
    transcription: _Transcription | None = None


class _Audio(Struct):
    input: _AudioInput | None = None


class _Session(Struct):
    model: Raw = Raw()
    audio: _Audio | None = None
    input_audio_transcription: _Transcription | None = None


class _Message(Struct):
    type: Raw = Raw()
    response: Raw = Raw()
    session: Raw = Raw()
    usage: Raw = Raw()
    item_id: Raw = Raw()
    content_index: Raw = Raw()


_message_in = msgspec.json.Decoder(_Message).decode
_session_in = msgspec.json.Decoder(_Session).decode


class RealtimeReader:
    """Adds up what the responses on one socket used, each of them once, by model. Never raises.

    `model` is the one asked for in the handshake, "" if none: a realtime response does not say its own.
    `unfinished` is what has begun and not ended; `is_untold`: what has just ended has written something, and does not
    say what it used.
    """

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.transcription_model = ""
        self.unfinished = Unfinished()
        self.is_untold = False
        self._seen: dict[str, None] = {}
        self._used: dict[tuple[str, str, bool], Usage] = {}
        self._live_seconds = 0.0

    def feed(self, message: str | bytes) -> str:
        """Take a message of the upstream's; return its type, "" for a piece of an answer, or what is none."""
        # The beginning is enough to know a piece of audio or text by.
        head = _bytes_of(message[:_LOOK_FOR_KIND_IN])
        if _DELTA in head:
            self._take_piece(head, message)
            return ""
        try:
            read = _message_in(message)
        except UNREADABLE:
            return ""
        kind = name_in(read.type)
        if kind in RESPONSE_ENDS:
            self._take_response(read)
        elif kind == "response.created":
            self._take_beginning(read)
        elif kind == "error":
            self.unfinished.refuse()
        elif kind.endswith(".delta"):
            self._take_piece(f'"{kind}"'.encode(), message)
        elif kind == _TRANSCRIBED:
            self._take_transcription(read)
        elif kind in _SESSIONS:
            self._take_session(read)
        elif kind in _SECONDS:
            self._take_seconds(read)
        return kind

    def feed_up(self, message: str | bytes) -> None:
        """Take a message of the client's; one whose type stands at neither end is no request that is seen here."""
        head, tail = _bytes_of(message[:_LOOK_FOR_KIND_IN]), _bytes_of(message[-_LOOK_FOR_KIND_IN:])
        if _CREATE in head or _CREATE in tail:
            self.unfinished.ask(message)
        elif _ITEM in head or _ITEM in tail:
            self.unfinished.add_item(message)

    def has_used(self) -> bool:
        """Return whether `take` would return anything."""
        return bool(self._used)

    def take(self) -> list[RealtimeReading]:
        """Return what was used since the last call: at the end of a session, and now and then within it."""
        taken = [
            RealtimeReading(usage, model, tier, is_transcription)
            for (model, tier, is_transcription), usage in self._used.items()
        ]
        self._used.clear()
        return taken

    def _take_piece(self, kind: bytes, message: str | bytes) -> None:
        """Take a piece of an answer; `kind` has its type in it."""
        if _AUDIO_DELTA in kind:
            self.unfinished.speak()
        elif _OF_RESPONSE in kind:
            self.unfinished.write(message)

    def _take_response(self, read: _Message) -> None:
        try:
            response = reply_in(read.response)
        except UNREADABLE:
            response = Reply()
        usage, identity = usage_in(response.usage, Meter.REALTIME), name_in(response.id)
        if usage is not None and not self._is_new(identity):
            return
        self.is_untold = usage is None and self.unfinished.has_written
        if not self.is_untold:
            self.unfinished.end(identity)
        if usage is not None:
            self._add(usage, name_in(response.model) or self.model, name_in(response.service_tier))

    def _take_beginning(self, read: _Message) -> None:
        try:
            response = reply_in(read.response)
        except UNREADABLE:
            return
        model, tier = name_in(response.model), name_in(response.service_tier)
        self.unfinished.begin(name_in(response.id), model=model, service_tier=tier)

    def take_unfinished(self) -> UnfinishedResponse:
        """Return what is known of what has begun and not been told; it is not said again."""
        self.is_untold = False
        return self.unfinished.take()

    def _take_transcription(self, read: _Message) -> None:
        usage = usage_in(read.usage, Meter.TRANSCRIPTION)
        if usage is not None and self._is_new(f"{name_in(read.item_id)} {bytes(read.content_index)[:8]!r}"):
            self._add(usage, self.transcription_model, "", is_transcription=True)

    def _take_session(self, read: _Message) -> None:
        try:
            session = _session_in(read.session)
        except UNREADABLE:
            return
        self.model = name_in(session.model) or self.model
        transcription = session.input_audio_transcription
        if session.audio and session.audio.input:
            transcription = session.audio.input.transcription
        if transcription:
            self.transcription_model = name_in(transcription.model) or self.transcription_model

    def _take_seconds(self, read: _Message) -> None:
        usage = usage_in(read.usage, Meter.REALTIME)
        if usage is not None and usage.seconds > self._live_seconds:
            # A live session says its total so far, each time.
            self._add(Usage(seconds=usage.seconds - self._live_seconds), self.model, "")
            self._live_seconds = usage.seconds

    def _is_new(self, identity: str) -> bool:
        if identity in self._seen:
            return False
        if identity:
            self._seen[identity] = None
        if len(self._seen) > _REMEMBERED_IDS:
            del self._seen[next(iter(self._seen))]
        return True

    def _add(self, usage: Usage, model: str, tier: str, *, is_transcription: bool = False) -> None:
        used = self._used
        place = (model, tier, is_transcription)
        if place not in used and len(used) >= _MOST_MODELS:
            place = (self.model, "", is_transcription)
        before = used.get(place)
        used[place] = usage if before is None else Usage(*map(operator.add, _counts(before), _counts(usage)))


def _bytes_of(piece: str | bytes) -> bytes:
    return piece.encode("utf-8", "replace") if isinstance(piece, str) else piece
