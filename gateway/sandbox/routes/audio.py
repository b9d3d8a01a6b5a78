"""POST /v1/audio/speech, transcriptions, translations. Speech is a tone in a real WAV; nothing is heard."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.sandbox.fields import missing, wrong_value
from gateway.sandbox.media import seconds_of, wav
from gateway.sandbox.shelf import Stock
from gateway.sandbox.tokens import pieces_of, tokens_in
from gateway.sandbox.wire import Answer, Call, Json, event_stream, json_answer, sse

_LONGEST_INPUT = 4096
_SPEECH_FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
_TEXT_FORMATS = ("json", "text", "srt", "verbose_json", "vtt", "diarized_json")
_AUDIO_TOKENS_PER_S = 10
_DELTA_BYTES = 4096


def speak(call: Call, stock: Stock) -> Answer:
    """Return audio/wav whatever `response_format` asks: a tone of 0.25 to 2 s, longer for a longer text."""
    fields = call.fields
    fields.model()
    text = fields.required_text("input")
    if len(text) > _LONGEST_INPUT:
        raise wrong_value("input", f"longer than {_LONGEST_INPUT} characters.", "string_above_max_length")
    if fields.raw("voice") is None:
        raise missing("voice")
    fields.choice("response_format", _SPEECH_FORMATS, "mp3")
    tokens = max(1, tokens_in(text))
    seconds = min(2.0, 0.2 + 0.05 * tokens)
    audio = wav(seconds, bytes.fromhex(call.id("", "tone", length=2)))
    if fields.choice("stream_format", ("audio", "sse"), "audio") == "sse":
        return event_stream(_speech_events(audio, tokens, round(seconds * _AUDIO_TOKENS_PER_S)))
    return Answer(200, "audio/wav", audio)


def _speech_events(audio: bytes, input_tokens: int, output_tokens: int) -> Iterator[bytes]:
    for start in range(0, len(audio), _DELTA_BYTES):
        part = base64.b64encode(audio[start : start + _DELTA_BYTES]).decode()
        yield sse({"type": "speech.audio.delta", "audio": part}, named=True)
    usage = {
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    yield sse({"type": "speech.audio.done", "usage": usage}, named=True)


def transcribe(call: Call, stock: Stock) -> Answer:
    return _hear(call, task="transcribe")


def translate(call: Call, stock: Stock) -> Answer:
    return _hear(call, task="translate")


def _hear(call: Call, *, task: str) -> Answer:
    model = call.fields.model()
    file = call.upload("file")
    form = call.fields.choice("response_format", _TEXT_FORMATS, "json")
    by_token = model.startswith("gpt-")
    if by_token and form in ("srt", "verbose_json", "vtt"):
        raise wrong_value("response_format", f"'{form}' is not compatible with model '{model}'. Use 'json' instead.")
    seconds = seconds_of(file.content)
    text = (
        f"You sent {file.filename}: {len(file.content)} bytes, {seconds} seconds of audio. "
        "This is the sandbox: it does not listen, and it always hears this."
    )
    usage = _token_usage(seconds, text) if by_token else {"type": "duration", "seconds": seconds}
    # whisper-1 ignores `stream`, as the API reference says.
    if by_token and task == "transcribe" and call.fields.flag("stream"):
        return event_stream(_transcript_events(text, usage))
    return _written(call, form, _Transcript(task, text, seconds, usage))


@dataclass(frozen=True, slots=True)
class _Transcript:
    task: str
    text: str
    seconds: float
    usage: Json


def _token_usage(seconds: float, text: str) -> Json:
    audio_tokens = max(1, round(seconds * _AUDIO_TOKENS_PER_S))
    output_tokens = tokens_in(text)
    return {
        "type": "tokens",
        "input_tokens": audio_tokens,
        "input_token_details": {"text_tokens": 0, "audio_tokens": audio_tokens},
        "output_tokens": output_tokens,
        "total_tokens": audio_tokens + output_tokens,
    }


def _transcript_events(text: str, usage: Json) -> Iterator[bytes]:
    for piece in pieces_of(text, at_most=40):
        yield sse({"type": "transcript.text.delta", "delta": piece}, named=True)
    yield sse({"type": "transcript.text.done", "text": text, "usage": usage}, named=True)


def _written(call: Call, form: str, heard: _Transcript) -> Answer:
    end = heard.seconds
    if form == "text":
        return Answer(200, "text/plain; charset=utf-8", heard.text.encode() + b"\n")
    if form == "srt":
        lines = f"1\n{_clock(0, ',')} --> {_clock(end, ',')}\n{heard.text}\n\n"
        return Answer(200, "text/plain; charset=utf-8", lines.encode())
    if form == "vtt":
        lines = f"WEBVTT\n\n{_clock(0, '.')} --> {_clock(end, '.')}\n{heard.text}\n\n"
        return Answer(200, "text/plain; charset=utf-8", lines.encode())
    if form == "verbose_json":
        return json_answer(_verbose(call, heard))
    if form == "diarized_json":
        segment = {"type": "transcript.text.segment", "id": "seg_0", "speaker": "A", "start": 0.0, "end": end}
        about = {"task": heard.task, "duration": end, "text": heard.text, "usage": heard.usage}
        return json_answer(about | {"segments": [segment | {"text": heard.text}]})
    usage = {"usage": heard.usage} if heard.task == "transcribe" else {}
    return json_answer({"text": heard.text} | usage)


def _verbose(call: Call, heard: _Transcript) -> Json:
    segment = {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": heard.seconds,
        "text": heard.text,
        "tokens": [50364, 50464],
        "temperature": 0.0,
        "avg_logprob": -0.25,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.01,
    }
    answer: Json = {
        "task": heard.task,
        "language": "english",
        "duration": heard.seconds,
        "text": heard.text,
        "segments": [segment],
    }
    if heard.task == "transcribe":
        answer["usage"] = heard.usage
    if "word" in call.fields.items("timestamp_granularities"):
        answer["words"] = _words(heard)
    return answer


def _words(heard: _Transcript) -> list[Json]:
    words = heard.text.split()
    each = heard.seconds / len(words)
    return [
        {"word": word, "start": round(index * each, 2), "end": round((index + 1) * each, 2)}
        for index, word in enumerate(words)
    ]


def _clock(seconds: float, mark: str) -> str:
    """Return 00:00:01,500 or, with a point as the mark, 00:00:01.500."""
    total_ms = round(seconds * 1000)
    minutes, ms = divmod(total_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{ms // 1000:02}{mark}{ms % 1000:03}"
