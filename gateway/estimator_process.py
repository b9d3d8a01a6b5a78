"""The process that counts tokens: jobs on stdin, counts on stdout, until stdin ends.

One beside each worker that needs it, since the vocabulary takes some 80 MB. What it is given it writes nowhere:
no log, no file, no core dump; it is started with stderr closed off, and nothing of a job is in its arguments or
environment. It ends with its parent, whose end closes stdin, and by no signal that the terminal sends to all.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import re
import signal
import sys
from collections.abc import Callable
from typing import IO

import msgspec

from gateway.endpoints import Meter
from gateway.usage.facts import prompt_sample

if sys.platform != "win32":
    import resource

Count = Callable[[str], int]

# The rule of OpenAI's cookbook, "How to count tokens with tiktoken": 3 tokens for each message, and those of its
# role, and 3 with which the reply begins. A sample has no roles, but a line end between two messages, which costs
# as much: only the first role is missing.
MESSAGE_TOKENS = 3
ROLE_TOKENS = 1
REPLY_TOKENS = 3
# What GPT-4o takes for 1024 × 1024 pixels in high detail: 85 + 4 · 170. The size of an image is not looked at.
IMAGE_TOKENS = 765

PROMPT_METERS = frozenset({Meter.CHAT, Meter.COMPLETIONS, Meter.RESPONSES, Meter.EMBEDDINGS, Meter.RUNS})
OUTPUT_METERS = PROMPT_METERS - {Meter.EMBEDDINGS} | {Meter.TRANSCRIPTION, Meter.OTHER}
_OF_MESSAGES = frozenset({Meter.CHAT, Meter.RESPONSES})

_CL100K = re.compile(r"gpt-3\.?5|gpt-4(?![.\do])|text-embedding-|(?:davinci|babbage)-002")
_LONGEST_JOB_S = 10
_SIZE_BYTES = 4


class Job(msgspec.Struct, frozen=True):
    """A request, b"" if not known, and in UTF-8 what was answered."""

    meter: Meter
    encoding: str
    body: bytes = b""
    text: bytes = b""


class _JobHead(msgspec.Struct, frozen=True, array_like=True):
    """A job without its text, which follows as it is: to encode megabytes holds the whole worker up."""

    meter: Meter
    encoding: str
    body_bytes: int
    text_bytes: int


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """The tokens of a job: of all of its prompt, and of the text as it stands."""

    input_tokens: int = 0
    output_tokens: int = 0


def encoding_name(model: str) -> str:
    """Return the encoding of a model, by any of its names: `ft:…`, `vendor/…`, Azure's `gpt-35-…`."""
    name = model.lower().removeprefix("ft:").rpartition("/")[2]
    return "cl100k_base" if _CL100K.match(name) else "o200k_base"


def counts_of(job: Job, count: Count) -> Counts:
    """Return the tokens of a job. `count` counts those of a text without surrogates."""
    return Counts(
        _prompt_tokens(job.meter, job.body, count) if job.body else 0,
        count(job.text.decode("utf-8", "replace")) if job.text else 0,
    )


def extrapolated(tokens: int, *, seen: int, kept: int) -> int:
    """Return the tokens of a whole of which a part was counted, of `kept` out of `seen` characters or bytes."""
    return round(tokens * seen / kept) if 0 < kept < seen else tokens


def _prompt_tokens(meter: Meter, body: bytes, count: Count) -> int:
    sample = prompt_sample(body)
    size = len(sample.text)
    tokens = sample.tokens + extrapolated(count(sample.text), seen=size + sample.left_out_chars, kept=size)
    tokens += sample.images * IMAGE_TOKENS
    if meter in _OF_MESSAGES and sample.messages:
        tokens += sample.messages * MESSAGE_TOKENS + ROLE_TOKENS + REPLY_TOKENS
    return tokens


def counter(encoding: str) -> Count:
    """Return what counts the tokens of a text. Errors: ImportError where bpe-openai is not installed or broken."""
    # Only the compiled half: bpe_openai itself reads three vocabularies into dicts of Python when it is imported,
    # which takes a second and as much memory again, and refuses texts of a million characters.
    package = importlib.util.find_spec("bpe_openai")
    places = package.submodule_search_locations if package else None
    found = importlib.machinery.PathFinder.find_spec("_bindings", places) if places else None
    if found is None or found.loader is None:
        raise ImportError("bpe_openai has no compiled half")
    bindings = importlib.util.module_from_spec(found)
    found.loader.exec_module(bindings)
    count: Count = bindings.tokenizer_for_encoding(encoding).count
    return count


def send_job(stream: IO[bytes], job: Job) -> None:
    """Write a job. Errors: OSError."""
    _send(stream, _JobHead(job.meter, job.encoding, len(job.body), len(job.text)), job.body, job.text)


def receive_counts(stream: IO[bytes]) -> Counts | None:
    """Read the answer to a job, None if it could not be counted. Errors: EOFError, OSError, MsgspecError."""
    return msgspec.msgpack.decode(_received(stream), type=Counts | None)


def _send(stream: IO[bytes], message: object, *more: bytes) -> None:
    """Write a message with its length before it, and what follows on it."""
    data = msgspec.msgpack.encode(message)
    for part in (len(data).to_bytes(_SIZE_BYTES, "big"), data, *more):
        stream.write(part)
    stream.flush()


def _received(stream: IO[bytes]) -> bytes:
    return _exactly(stream, int.from_bytes(_exactly(stream, _SIZE_BYTES), "big"))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _shut_in() -> None:
    # Ctrl-C and a stopping service reach all of a group; the worker may still have something to count.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Let the kernel end this process in so many seconds; 0 takes that back."""
    if sys.platform != "win32":
        signal.alarm(seconds)


def _answer(job: Job, counters: dict[str, Count]) -> Counts | None:
    count = counters.get(job.encoding) or counters.setdefault(job.encoding, counter(job.encoding))
    try:
        return counts_of(job, count)
    except Exception:  # one job that cannot be counted must not cost the next one a start; its text is not for a log
        return None


def _serve(counters: dict[str, Count]) -> None:
    """Answer one job; nothing of it is held afterwards."""
    stdin = sys.stdin.buffer
    head = msgspec.msgpack.decode(_received(stdin), type=_JobHead)
    job = Job(head.meter, head.encoding, _exactly(stdin, head.body_bytes), _exactly(stdin, head.text_bytes))
    _limit_time(_LONGEST_JOB_S)
    _send(sys.stdout.buffer, _answer(job, counters))
    _limit_time(0)


def main() -> None:
    """Answer jobs until stdin ends."""
    _shut_in()
    counters: dict[str, Count] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            _serve(counters)


if __name__ == "__main__":
    main()
