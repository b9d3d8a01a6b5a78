"""What a request may use at most, told before it goes upstream. Pure.

Of text there are never more tokens than bytes. What a request only refers to (an image, a file, what was said in
another response) is in nobody's sight: each such reference counts as so many tokens as the operator says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec
from msgspec import Raw, Struct

from billing.events import Usage
from gateway.endpoints import Endpoint, Meter
from gateway.usage.facts import RequestFacts

_TEXT = frozenset({Meter.CHAT, Meter.COMPLETIONS, Meter.RESPONSES, Meter.RUNS, Meter.OTHER})
_AUDIO_IN = frozenset({Meter.TRANSCRIPTION, Meter.TRANSLATION})
_BYTES_A_TOKEN = 4
# gpt-image-1's largest picture at its best has 6,240.
_IMAGE_TOKENS = 6_500
_MOST_IMAGES_SHOWN = 16  # to gpt-image-1, in one edit
# The least that speech is compressed to, 16 kbit/s; and of gpt-4o-transcribe's tokens somewhat more than it counts.
_AUDIO_BYTES_A_SECOND = 2_000
_AUDIO_TOKENS_A_SECOND = 16
_SPEECH_TOKENS_A_CHARACTER = 2
_COMPLETION_TOKENS = 16  # what /v1/completions writes where nothing is said
_MOST_COUNT = 10_000_000
_BASE64 = b";base64,"
_REFERENCES = (
    b'"image_url"',
    b'"input_image"',
    b'"image_file"',
    b'"file_id"',
    b'"file_url"',
    b'"file_data"',
    b'"previous_response_id"',
    b'"conversation"',
)
# Families that think before they write, which their streams do not show: of OpenAI's all since o1, Gemini, Grok.
_THINKS = re.compile(r"o[1-9]|gpt-[5-9]|codex|gemini-(?:2\.5|[3-9])|grok-(?:[4-9]|code|build)", re.IGNORECASE)
# Also as lenient parsers read it: blanks, no quotes, escapes within them, RFC 5987's form.
_MODEL_FIELD = re.compile(
    rb";[ \t]{0,8}name\*?[ \t]{0,8}=[ \t]{0,8}(?:utf-8'[a-z-]{0,8}')?\"?\\?m\\?o\\?d\\?e\\?l\"?[ \t]{0,8}[;\r\n]",
    re.IGNORECASE,
)
MODEL_FIELD_MOST_BYTES = 80


_NOTHING = Usage()


@dataclass(frozen=True, slots=True)
class Demand:
    """`most` is what may be used at most; `prompt_tokens` a guess at its input, `output_tokens` what it may write.

    `is_stated`: the client has said itself how much may be written, so that the upstream ends the answer there.
    `is_free`: it uses no model.
    """

    most: Usage = _NOTHING
    prompt_tokens: int = 0
    output_tokens: int = 0
    is_stated: bool = True
    is_free: bool = False


FREE = Demand(is_free=True)


class _Bounds(Struct):
    max_tokens: Raw = Raw()
    max_completion_tokens: Raw = Raw()
    max_output_tokens: Raw = Raw()
    best_of: Raw = Raw()
    prompt: Raw = Raw()


_bounds_in = msgspec.json.Decoder(_Bounds).decode
_count_in = msgspec.json.Decoder(int).decode
_list_in = msgspec.json.Decoder(list[Raw]).decode
# What an endpoint takes for a bound; of a route that is none of OpenAI's nobody knows.
_BOUNDS_OF = {
    Meter.CHAT: ("max_tokens", "max_completion_tokens"),
    Meter.COMPLETIONS: ("max_tokens",),
    Meter.RESPONSES: ("max_output_tokens",),
    Meter.RUNS: ("max_completion_tokens",),
}
_ANY_BOUND = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def demand_of(
    endpoint: Endpoint,
    facts: RequestFacts,
    *,
    body: bytes | None,
    body_bytes: int,
    output_tokens: int,
    reference_tokens: int,
) -> Demand:
    """Return what a request may use; `output_tokens` is assumed where it does not say how much may be written.

    `body` is None where it was not looked at, `body_bytes` its length all the same.
    """
    meter = endpoint.meter
    if meter in _TEXT:
        return _text(meter, facts, body, body_bytes, output_tokens=output_tokens, reference_tokens=reference_tokens)
    if meter is Meter.EMBEDDINGS:
        return Demand(Usage(input_tokens=body_bytes), body_bytes // _BYTES_A_TOKEN)
    if meter is Meter.IMAGES:
        images = facts.choices
        drawn = images * _IMAGE_TOKENS
        text_bytes, references = _shown(facts, body, body_bytes)
        read = text_bytes + references * reference_tokens
        return Demand(Usage(input_tokens=read, image_output_tokens=drawn, images=images), 0, drawn)
    if meter in _AUDIO_IN:
        seconds = body_bytes // _AUDIO_BYTES_A_SECOND + 1
        heard = seconds * _AUDIO_TOKENS_A_SECOND
        return Demand(Usage(audio_input_tokens=heard, output_tokens=heard, seconds=seconds), heard, heard)
    if meter is Meter.SPEECH:
        spoken = facts.characters * _SPEECH_TOKENS_A_CHARACTER
        return Demand(
            Usage(input_tokens=facts.characters, audio_output_tokens=spoken, characters=facts.characters),
            facts.characters // _BYTES_A_TOKEN,
            spoken,
        )
    if meter is Meter.REALTIME:
        most = Usage(input_tokens=reference_tokens, output_tokens=output_tokens)
        return Demand(most, 0, output_tokens, is_stated=False)
    # A batch tells what it has used when it has ended, a video never; whoever has nothing left begins none.
    return Demand() if endpoint.has_untold_cost else FREE


def _shown(facts: RequestFacts, body: bytes | None, body_bytes: int) -> tuple[int, int]:
    """Return how many bytes of text a request for an image has, and how many images it shows or refers to."""
    if facts.form_bytes:
        # Of a form that is longer than what is looked at, the rest is files.
        is_whole = body_bytes <= facts.form_bytes
        return facts.text_bytes, facts.files if is_whole else max(facts.files, _MOST_IMAGES_SHOWN)
    if body is None:
        return body_bytes, 0
    return body_bytes - _attached_bytes(body), _references(body)


def _references(body: bytes) -> int:
    return sum(body.count(name) for name in _REFERENCES)


def _text(
    meter: Meter,
    facts: RequestFacts,
    body: bytes | None,
    body_bytes: int,
    *,
    output_tokens: int,
    reference_tokens: int,
) -> Demand:
    text_bytes, references = body_bytes, 0
    stated, candidates = None, facts.choices
    if body is not None:
        text_bytes -= _attached_bytes(body)
        references = _references(body)
        stated, times = _written(meter, body)
        candidates = max(candidates, times[0]) * times[1]
    # What is stored as an assistant's thread is in nobody's sight either.
    references += meter is Meter.RUNS
    written = (output_tokens if stated is None else stated) * candidates
    read = text_bytes + references * reference_tokens
    return Demand(
        Usage(input_tokens=read, output_tokens=written),
        text_bytes // _BYTES_A_TOKEN,
        written,
        is_stated=stated is not None and meter in _BOUNDS_OF,
    )


def _written(meter: Meter, body: bytes) -> tuple[int | None, tuple[int, int]]:
    """Return how many tokens a request allows to be written, if it says so, and how often: candidates, prompts."""
    try:
        read = _bounds_in(body)
    except _UNREADABLE:
        return None, (1, 1)
    said = [_count(getattr(read, name)) for name in _BOUNDS_OF.get(meter, _ANY_BOUND)]
    stated = max((count for count in said if count is not None), default=None)
    if meter is not Meter.COMPLETIONS:
        return stated, (1, 1)
    return (_COMPLETION_TOKENS if stated is None else stated), (_count(read.best_of) or 1, _prompts(read.prompt))


def _count(raw: Raw) -> int | None:
    try:
        return min(max(_count_in(raw), 0), _MOST_COUNT)
    except _UNREADABLE:
        return None


def _prompts(raw: Raw) -> int:
    """Return how many prompts /v1/completions is given: a list of texts, or of lists of tokens, has several."""
    try:
        found = _list_in(raw)
    except _UNREADABLE:
        return 1
    return max(1, sum(bytes(one)[:1] in (b'"', b"[") for one in found))


def _attached_bytes(body: bytes) -> int:
    """Return how much of a body is data in base64, which counts as what it is data of."""
    found, at = 0, body.find(_BASE64)
    while at >= 0:
        end = body.find(b'"', at)
        end = len(body) if end < 0 else end
        found += end - at
        at = body.find(_BASE64, end)
    return found


def thinks_unseen(model: str) -> bool:
    """Return whether a model may write more than its stream shows; a fine-tuned one does as its base."""
    name = model.rpartition("/")[2].removeprefix("ft:")
    return bool(_THINKS.match(name)) and "non-reasoning" not in name


def model_fields(form: bytes) -> int:
    """Return how many fields named `model` a piece of a multipart form may have; a piece that is cut may hide one."""
    return len(_MODEL_FIELD.findall(form))
