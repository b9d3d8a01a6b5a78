"""The usage objects of OpenAI's answers, and those of its likenesses, turned into disjoint buckets. Pure."""

from __future__ import annotations

import functools
import math
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from billing.events import Usage
from billing.pricing import MAX_QUANTITY
from gateway.endpoints import Meter

UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
_MOST_SECONDS = 1e9
_LONGEST_NAME = 100
_USUAL_NAME_BYTES = 102

# Where tokens are text unless told otherwise.
_PLAIN = (Meter.CHAT, Meter.COMPLETIONS)

# Some upstreams write counts as 12.0; null stands for a count that does not apply.
_Count = int | float | None


class _Details(Struct):
    cached_tokens: _Count = None
    cache_write_tokens: _Count = None
    audio_tokens: _Count = None
    image_tokens: _Count = None
    text_tokens: _Count = None
    reasoning_tokens: _Count = None
    cached_tokens_details: _Details | None = None


# An upstream in PHP writes an empty object as [].
_Listed = _Details | Annotated[list[int], Meta(max_length=0)] | None


class _Reported(Struct):
    """Every spelling: chat and completions, responses and batches, images, audio, realtime; then other upstreams."""

    prompt_tokens: _Count = None
    completion_tokens: _Count = None
    input_tokens: _Count = None
    output_tokens: _Count = None
    total_tokens: _Count = None
    seconds: _Count = None
    prompt_tokens_details: _Listed = None
    completion_tokens_details: _Listed = None
    input_tokens_details: _Listed = None
    output_tokens_details: _Listed = None
    input_token_details: _Listed = None
    output_token_details: _Listed = None
    # DeepSeek; Moonshot; Anthropic, whose input_tokens are without these two.
    prompt_cache_hit_tokens: _Count = None
    cached_tokens: _Count = None
    cache_read_input_tokens: _Count = None
    cache_creation_input_tokens: _Count = None


_Tokens = Annotated[int, Meta(ge=0, le=MAX_QUANTITY)]
_None = Annotated[int, Meta(ge=0, le=0)]


class _PlainRead(Struct, frozen=True, forbid_unknown_fields=True):
    cached_tokens: _Tokens = 0
    audio_tokens: _None = 0


class _PlainWritten(Struct, frozen=True, forbid_unknown_fields=True):
    reasoning_tokens: _Tokens = 0
    audio_tokens: _None = 0
    accepted_prediction_tokens: _Tokens = 0
    rejected_prediction_tokens: _Tokens = 0


class _Plain(Struct, forbid_unknown_fields=True):
    """Nothing but text, in OpenAI's own spelling: see `_plain_usage`."""

    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    total_tokens: int
    prompt_tokens_details: _PlainRead = _PlainRead()
    completion_tokens_details: _PlainWritten = _PlainWritten()


class Reply(Struct):
    """The members of an answer, or of an event, that metering looks at: undecoded, so that none spoils another."""

    id: Raw = Raw()
    object: Raw = Raw()
    type: Raw = Raw()
    model: Raw = Raw()
    service_tier: Raw = Raw()
    usage: Raw = Raw()
    response: Raw = Raw()
    data: Raw = Raw()
    duration: Raw = Raw()
    background: Raw = Raw()
    status: Raw = Raw()
    error: Raw = Raw()


_plain_in = msgspec.json.Decoder(_Plain).decode
_reported_in = msgspec.json.Decoder(_Reported).decode
_text_in = msgspec.json.Decoder(str).decode
reply_in = msgspec.json.Decoder(Reply).decode
elements_in = msgspec.json.Decoder(list[Raw]).decode
_NO_DETAILS = _Details()
_FAILURES = frozenset({"error", "response.failed"})
_SETTLED = frozenset({"", "completed", "incomplete", "failed", "expired", "cancelled"})


def reply_of(members: dict[str, bytes]) -> Reply:
    return Reply(**{name: Raw(value) for name, value in members.items() if name in Reply.__struct_fields__})


def name_in(raw: Raw | bytes) -> str:
    """Return a JSON string as a name that is fit for a record: printable, at most 100 characters; else ""."""
    if len(raw) <= _USUAL_NAME_BYTES:
        return _usual_name(bytes(raw)) if raw else ""
    return _name(bytes(raw))


def _name(string: bytes) -> str:
    if string[:1] != b'"':
        return ""
    try:
        text = _text_in(string)[:_LONGEST_NAME]
    except UNREADABLE:
        return ""
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def is_settled(reply: Reply) -> bool:
    """Return whether a stored object's usage is its last: one that still runs may report more at the next look."""
    return name_in(reply.status) in _SETTLED


def has_failed(reply: Reply) -> bool:
    """Return whether an answer, or an event, says that it is a failure."""
    return name_in(reply.type) in _FAILURES or name_in(reply.status) == "failed" or len(reply.error) > len(b"null")


# The names of models and tiers are few; what else somebody sends pushes only its like out.
_usual_name = functools.lru_cache(maxsize=1024)(_name)


def usage_in(raw: Raw | bytes, meter: Meter) -> Usage | None:
    """Return what a usage object reports, None where it is none: null, without counts, or with impossible ones.

    Zero is a report like any other.
    """
    if len(raw) <= len(b"null"):
        return None
    if meter in _PLAIN and (plain := _plain_usage(raw)) is not None:
        return plain
    try:
        return _usage(_reported_in(raw), meter)
    except UNREADABLE:
        return None


def duration_in(raw: Raw | bytes) -> Usage | None:
    """Return the seconds of audio that a verbose transcription states, which some upstreams write as a string."""
    try:
        seconds = float(bytes(raw).strip(b'"'))
    except ValueError:
        return None
    return Usage(seconds=seconds) if 0 <= seconds <= _MOST_SECONDS else None


def _plain_usage(raw: Raw | bytes) -> Usage | None:
    """Return the usage in a report of text as OpenAI writes it, None where anything is out of the ordinary.

    Nearly all reports are of this kind, for which `_usage` finds the same by looking at ten times as much.
    """
    try:
        report = _plain_in(raw)
    except UNREADABLE:
        return None
    given, made = report.prompt_tokens, report.completion_tokens
    cached, reasoning = report.prompt_tokens_details.cached_tokens, report.completion_tokens_details.reasoning_tokens
    if cached > given or reasoning > made or given + made != report.total_tokens:
        return None
    return Usage(given - cached, cached, 0, made, reasoning)


def _usage(reported: _Reported, meter: Meter) -> Usage | None:
    total_input = reported.input_tokens if reported.prompt_tokens is None else reported.prompt_tokens
    total_output = reported.output_tokens if reported.completion_tokens is None else reported.completion_tokens
    if total_input is None:
        if reported.seconds is not None:
            return Usage(seconds=_seconds(reported.seconds))
        if total_output is not None or reported.total_tokens is None:
            # Half a report would be billed as if the other half were free.
            return None
        total_input = reported.total_tokens
    given = _first(reported.prompt_tokens_details, reported.input_tokens_details, reported.input_token_details)
    details = given or _NO_DETAILS
    details_out = (
        _first(reported.completion_tokens_details, reported.output_tokens_details, reported.output_token_details)
        or _NO_DETAILS
    )
    input_count, output_count = _count(total_input), _count(total_output)
    cached, written = _cached(reported, details)
    if reported.prompt_tokens is None and given is None and _is_anthropic(reported):
        input_count += cached + written
    reasoning = _count(details_out.reasoning_tokens)
    if reasoning and _count(reported.total_tokens) == input_count + output_count + reasoning:
        output_count += reasoning  # xAI and Gemini count thinking beside the completion, not in it
    if input_count > MAX_QUANTITY or output_count > MAX_QUANTITY:
        raise ValueError("no token count, but a sum of some")
    audio = _input_audio(details, input_count, meter)
    audio_output, image_output = _output_media(details_out, output_count, meter)
    text = output_count - audio_output - image_output
    if not (audio or details.image_tokens or written):
        cached = min(cached, input_count)
        buckets = (input_count - cached, cached, 0, 0, 0, 0, 0)
    else:
        buckets = _input_buckets(
            input_count,
            cached=cached,
            written=written,
            audio=audio,
            image=_count(details.image_tokens),
            cached_details=details.cached_tokens_details or _NO_DETAILS,
        )
    return Usage(
        buckets[0],
        buckets[1],
        buckets[2],
        text,
        min(reasoning, text),
        buckets[3],
        buckets[4],
        audio_output,
        buckets[5],
        buckets[6],
        image_output,
        seconds=_seconds(reported.seconds),
    )


def _first(*listed: _Listed) -> _Details | None:
    return next((details for details in listed if isinstance(details, _Details)), None)


def _cached(reported: _Reported, details: _Details) -> tuple[int, int]:
    """Return the tokens read from a cache and those written to it."""
    cached = details.cached_tokens
    if cached is None:
        cached = reported.prompt_cache_hit_tokens or reported.cached_tokens or reported.cache_read_input_tokens
    written = details.cache_write_tokens
    return _count(cached), _count(reported.cache_creation_input_tokens if written is None else written)


def _input_buckets(
    total: int, *, cached: int, written: int, audio: int, image: int, cached_details: _Details
) -> tuple[int, int, int, int, int, int, int]:
    """Return (text, cached text, cache write, audio, cached audio, image, cached image), which sum to `total`.

    Details that contradict the total are cut down to it. Cached tokens are text unless told otherwise, or unless
    there is not text enough.
    """
    audio = min(audio, total)
    image = min(image, total - audio)
    text = total - audio - image
    cached = min(cached, total)
    cached_audio = min(_count(cached_details.audio_tokens), audio, cached)
    cached_image = min(_count(cached_details.image_tokens), image, cached - cached_audio)
    cached_text = min(cached - cached_audio - cached_image, text)
    rest = cached - cached_audio - cached_image - cached_text
    more_audio = min(rest, audio - cached_audio)
    cached_audio += more_audio
    cached_image += rest - more_audio
    written = min(written, text - cached_text)
    return (
        text - cached_text - written,
        cached_text,
        written,
        audio - cached_audio,
        cached_audio,
        image - cached_image,
        cached_image,
    )


def _input_audio(details: _Details, total: int, meter: Meter) -> int:
    if details.audio_tokens is None and details.text_tokens is None and meter is Meter.TRANSCRIPTION:
        return total
    return _count(details.audio_tokens)


def _output_media(details: _Details, total: int, meter: Meter) -> tuple[int, int]:
    """Return the audio and the image tokens within an output; without details it is what the route is for."""
    audio, image = details.audio_tokens, details.image_tokens
    if not (audio or image) and meter is not Meter.IMAGES and meter is not Meter.SPEECH:
        return 0, 0
    if audio is None and image is None:
        media = total - min(_count(details.text_tokens), total)
        return (0, media) if meter is Meter.IMAGES else (media, 0)
    audio_count = min(_count(audio), total)
    return audio_count, min(_count(image), total - audio_count)


def _is_anthropic(reported: _Reported) -> bool:
    return reported.cache_read_input_tokens is not None or reported.cache_creation_input_tokens is not None


def _count(value: _Count) -> int:
    """Return a token count; ValueError for what cannot be one."""
    if not value:
        return 0
    if not 0 <= value <= MAX_QUANTITY or value != int(value):
        raise ValueError("no token count")
    return int(value)


def _seconds(value: _Count) -> float:
    if not value:
        return 0.0
    if not (0 <= value <= _MOST_SECONDS and math.isfinite(value)):
        raise ValueError("no duration")
    return float(value)
