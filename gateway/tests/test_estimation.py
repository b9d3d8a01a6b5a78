"""Estimates: counted by a real process beside this one, and guessed where there is none."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import bpe_openai
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.estimation import MOST_BODY_BYTES, Estimator, guessed_tokens
from gateway.estimator_process import IMAGE_TOKENS, Counts, Job, counter, counts_of, encoding_name, extrapolated
from gateway.usage.sample import OutputSample

ROOT = str(Path(__file__).resolve().parents[2])
NOTHING = OutputSample()
# Long enough for any machine: what these tests want to see is a count, not a guess.
PATIENT_S = 60.0
SENTENCE = "The quick brown fox jumps over the lazy dog. "
TEXTS = [
    "hello world",
    "tiktoken is great!",
    SENTENCE * 50,
    "今天天气很好，我们去公园玩吧。",
    "😀👍🏽👩‍👩‍👧‍👦🇨🇳",
    "Привет, как дела? Γειά σου. مرحبا",
    "def f(x):\n\treturn {'a': [1, 22, 333, 4444]}\r\n",
    "<|endoftext|> is text here",
    "".join(map(chr, range(256))),
    "a" * 5000,
    " \n" * 3000,
]


@cache
def _library(encoding: str) -> Callable[[str], int]:
    """Return how many tokens the package's public interface, compatible with tiktoken, makes of a text."""
    encode = bpe_openai.get_encoding(encoding).encode_ordinary
    return lambda text: len(encode(text))


@pytest.fixture(scope="module")
def patient() -> Iterator[Estimator]:
    """An estimator that has its process, and waits for it as long as it takes."""
    estimator = Estimator(timeout_s=PATIENT_S)
    assert asyncio.run(_output_tokens(estimator, "hello world")) == 2
    yield estimator
    asyncio.run(estimator.aclose())


def _body(**members: Any) -> bytes:
    return json.dumps({"model": "gpt-4o", **members}, ensure_ascii=False).encode()


def _chat(*contents: Any) -> bytes:
    return _body(messages=[{"role": "user", "content": content} for content in contents])


async def _input_tokens(estimator: Estimator, meter: Meter, body: bytes | None, model: str = "gpt-4o") -> int:
    usage = await estimator.estimate(meter=meter, model=model, request_body=body, output=NOTHING)
    assert usage == Usage(input_tokens=usage.input_tokens)
    return usage.input_tokens


async def _output_tokens(estimator: Estimator, text: str, model: str = "gpt-4o") -> int:
    output = OutputSample(text, 100, 100)
    usage = await estimator.estimate(meter=Meter.CHAT, model=model, request_body=None, output=output)
    assert usage == Usage(output_tokens=usage.output_tokens)
    return usage.output_tokens


def _pid(estimator: Estimator) -> int:
    pid = estimator.child_pid
    assert pid is not None
    return pid


def _wait_for_end(pidfd: int) -> bool:
    """Return whether the process ends within a minute."""
    try:
        return bool(select.select([pidfd], [], [], PATIENT_S)[0])
    finally:
        os.close(pidfd)


# What is counted


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
@pytest.mark.parametrize("text", TEXTS)
async def test_an_output_has_the_tokens_that_the_library_counts(patient: Estimator, text: str, model: str) -> None:
    assert await _output_tokens(patient, text, model) == _library(encoding_name(model))(text)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4"])
async def test_a_text_has_the_tokens_that_openai_publishes(patient: Estimator, model: str) -> None:
    assert await _output_tokens(patient, "tiktoken is great!", model) == 6


async def test_half_a_surrogate_pair_is_counted_as_something(patient: Estimator) -> None:
    assert await _output_tokens(patient, "a\ud83d b \udc00") == _library("o200k_base")("a? b ?")


async def test_a_short_chat_has_the_tokens_that_openai_reports(patient: Estimator) -> None:
    assert await _input_tokens(patient, Meter.CHAT, _chat("hi")) == 8


async def test_each_message_costs_as_the_cookbook_says(patient: Estimator) -> None:
    one = await _input_tokens(patient, Meter.CHAT, _chat("hi"))

    # 3 for the message, 1 for its role, 1 for its text
    assert await _input_tokens(patient, Meter.CHAT, _chat("hi", "hi", "hi")) == one + 2 * 5


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("meter", [Meter.COMPLETIONS, Meter.EMBEDDINGS])
async def test_a_prompt_that_is_no_chat_costs_its_text(patient: Estimator, meter: Meter, text: str) -> None:
    name = "input" if meter is Meter.EMBEDDINGS else "prompt"

    assert await _input_tokens(patient, meter, _body(**{name: text})) == _library("o200k_base")(text)


async def test_a_prompt_of_tokens_is_as_long_as_it_is(patient: Estimator) -> None:
    assert await _input_tokens(patient, Meter.EMBEDDINGS, _body(input=[[5, 6, 7], [8]])) == 4


async def test_an_embedding_has_no_output(patient: Estimator) -> None:
    usage = await patient.estimate(
        meter=Meter.EMBEDDINGS,
        model="text-embedding-3-small",
        request_body=_body(input="hello world"),
        output=OutputSample("hello world", 10, 10),
    )

    assert usage == Usage(input_tokens=2)


async def test_an_image_costs_the_same_whatever_its_size(patient: Estimator) -> None:
    url = "data:image/png;base64," + base64.b64encode(os.urandom(300_000)).decode()
    image = {"type": "image_url", "image_url": {"url": url}}

    tokens = await _input_tokens(patient, Meter.CHAT, _chat([{"type": "text", "text": "hi"}, image]))

    assert tokens == 8 + IMAGE_TOKENS


async def test_an_output_kept_in_part_is_extrapolated(patient: Estimator) -> None:
    output = OutputSample("hello world", seen_bytes=5000, kept_bytes=1000)

    usage = await patient.estimate(meter=Meter.RESPONSES, model="gpt-5", request_body=None, output=output)

    assert usage == Usage(output_tokens=10)


@pytest.mark.parametrize(
    ("tokens", "seen", "kept", "expected"), [(7, 0, 0, 7), (7, 10, 10, 7), (7, 5, 10, 7), (7, 15, 10, 10)]
)
def test_a_part_stands_for_the_whole(tokens: int, seen: int, kept: int, expected: int) -> None:
    assert extrapolated(tokens, seen=seen, kept=kept) == expected


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("", "o200k_base"),
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("o3", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("deepseek-chat", "o200k_base"),
        ("ft:gpt-4o:acme::1", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("GPT-4-turbo-2024-04-09", "cl100k_base"),
        ("gpt-4-32k", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("gpt-35-turbo", "cl100k_base"),
        ("openai/gpt-4", "cl100k_base"),
        ("ft:gpt-3.5-turbo-0125:acme::1", "cl100k_base"),
        ("text-embedding-3-large", "cl100k_base"),
    ],
)
def test_a_model_has_its_encoding(model: str, encoding: str) -> None:
    assert encoding_name(model) == encoding


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00\x80" * 50, b"[" * 100_000, b'{"messages":7}']
)
@pytest.mark.parametrize("meter", list(Meter))
async def test_a_body_that_is_nothing_spoils_nothing(patient: Estimator, meter: Meter, body: bytes) -> None:
    pid = patient.child_pid

    await _input_tokens(patient, meter, body)

    assert await _output_tokens(patient, "hello world") == 2
    assert patient.child_pid == pid


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(Meter)), st.binary(max_size=500), st.binary(max_size=500))
def test_any_bytes_can_be_counted_and_guessed(meter: Meter, body: bytes, text: bytes) -> None:
    counts = counts_of(Job(meter, "o200k_base", body, text), _counter())

    assert counts.input_tokens >= 0
    assert 0 <= counts.output_tokens <= 3 * len(text)
    assert 0 <= guessed_tokens(text) <= len(text) + 1


@cache
def _counter() -> Callable[[str], int]:
    return counter("o200k_base")


def test_a_job_without_a_prompt_counts_none() -> None:
    assert counts_of(Job(Meter.CHAT, "o200k_base", b"", b"hi"), _counter()) == Counts(0, 1)


# What is guessed


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        (SENTENCE * 400, 0.25),
        ("今天天气很好，我们去公园玩吧。" * 400, 0.45),
        (json.dumps("今天天气很好，我们去公园玩吧。" * 400), None),
        (json.dumps([{"name": f"item {n}", "price": n * 1.5} for n in range(500)]), 0.45),
        (Path(__file__).read_text(), 0.3),
    ],
)
def test_a_guess_is_near_the_count(text: str, tolerance: float | None) -> None:
    """`tolerance` is None for escaped text, which stands for what it means."""
    tokens = _library("o200k_base")(text if tolerance else json.loads(text))

    assert guessed_tokens(text.encode()) == pytest.approx(tokens, rel=tolerance or 0.45)


def test_a_guess_takes_base64_for_no_text() -> None:
    image = base64.b64encode(os.urandom(1 << 20))
    text = (SENTENCE * 2000).encode()

    guessed = guessed_tokens(b'{"content":"' + text + b'","url":"data:image/png;base64,' + image + b'"}')

    assert guessed == pytest.approx(guessed_tokens(text), rel=0.2)


def test_a_guess_takes_compact_lists_of_tokens_for_tokens() -> None:
    assert guessed_tokens(json.dumps(list(range(10_000, 20_000)), separators=(",", ":")).encode()) >= 10_000


@pytest.mark.parametrize("data", [b"a b " * (64 << 10), "好".encode() * (85 << 10), b"\\u4f60" * (43 << 10)])
def test_a_guess_costs_the_loop_little(data: bytes) -> None:
    best = min(_seconds(guessed_tokens, data) for _ in range(20))

    # Half a millisecond on a machine of today's; a hundred times as much data would take a hundred times as long.
    assert best < 0.01
    assert min(_seconds(guessed_tokens, data * 100) for _ in range(20)) < 0.01


def _seconds(function: Callable[[bytes], int], data: bytes) -> float:
    started = time.perf_counter()
    function(data)
    return time.perf_counter() - started


# The process


async def test_there_is_no_process_until_something_is_to_be_counted() -> None:
    estimator = Estimator()

    for meter in Meter:
        assert await estimator.estimate(meter=meter, model="", request_body=None, output=NOTHING) == Usage()
    for meter in (Meter.NONE, Meter.BATCH, Meter.STORED, Meter.IMAGES, Meter.SPEECH):
        assert await _input_tokens(estimator, meter, _chat("hi")) == 0

    assert estimator.child_pid is None
    await estimator.aclose()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_either_loop_will_do(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def use() -> tuple[int, int | None]:
        estimator = Estimator(timeout_s=PATIENT_S)
        tokens = await _input_tokens(estimator, Meter.CHAT, _chat("hi"))
        assert estimator.child_pid is not None
        await estimator.aclose()
        return tokens, estimator.child_pid

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(use()) == (8, None)


async def test_a_hundred_at_once_are_all_counted() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, max_waiting=100)
    texts = [SENTENCE * n for n in range(1, 101)]

    counts = await asyncio.gather(*(_output_tokens(estimator, text) for text in texts))

    assert counts == [_library("o200k_base")(text) for text in texts]
    await estimator.aclose()


async def test_what_finds_no_place_to_wait_is_guessed_at_once() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, max_waiting=2)
    await _output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    text = "今天天气很好"
    waiting = [asyncio.ensure_future(_output_tokens(estimator, text)) for _ in range(50)]

    # One may be under way and two wait: the others do not wait for the process, which stands still.
    await _until(lambda: sum(task.done() for task in waiting) >= 47)
    os.kill(pid, signal.SIGCONT)
    counts = await asyncio.gather(*waiting)

    counted, guessed = _library("o200k_base")(text), guessed_tokens(text.encode())
    assert counted != guessed
    assert set(counts) == {counted, guessed}
    assert 2 <= counts.count(counted) <= 3
    await estimator.aclose()


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not is_so():
            await _turn()


async def _turn() -> None:
    """Let the loop go round once."""
    turned = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(turned.set_result, None)
    await turned


async def test_a_process_that_stands_still_costs_no_more_than_the_timeout() -> None:
    estimator = Estimator(timeout_s=0.2)
    await _recovered(estimator, "今天天气很好")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    text = "今天天气很好"

    started = time.monotonic()
    guessed = await _output_tokens(estimator, text)

    assert guessed == guessed_tokens(text.encode()) != _library("o200k_base")(text)
    # Until it goes on, that would be for ever.
    assert 0.1 < time.monotonic() - started < PATIENT_S / 2
    os.kill(pid, signal.SIGCONT)
    await _recovered(estimator, text)
    assert estimator.child_pid == pid
    await estimator.aclose()


async def _recovered(estimator: Estimator, text: str) -> None:
    """Ask until the answer is counted, not guessed."""
    async with asyncio.timeout(PATIENT_S):
        while await _output_tokens(estimator, text) != _library("o200k_base")(text):
            pass


async def test_what_was_given_up_is_not_taken_for_the_next_answer() -> None:
    estimator = Estimator(timeout_s=PATIENT_S)
    await _output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    texts = [SENTENCE * n for n in range(1, 21)]
    tasks = [asyncio.ensure_future(_output_tokens(estimator, text)) for text in texts]
    await _turn()
    for task in tasks[::2]:
        task.cancel()
    os.kill(pid, signal.SIGCONT)

    counts = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(count, asyncio.CancelledError) for count in counts[::2])
    assert counts[1::2] == [_library("o200k_base")(text) for text in texts[1::2]]
    assert await _output_tokens(estimator, "hello world") == 2
    assert estimator.child_pid == pid
    await estimator.aclose()


async def test_a_killed_process_is_replaced_by_guesses_and_then_by_another_one() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=0)
    await _output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGKILL)
    text = "今天天气很好"
    possible = {_library("o200k_base")(text), guessed_tokens(text.encode())}

    assert await _output_tokens(estimator, text) in possible
    await _recovered(estimator, text)

    assert estimator.child_pid not in (None, pid)
    await estimator.aclose()


async def test_a_process_is_not_started_again_at_once() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=3600)
    await _output_tokens(estimator, "hi")
    pidfd = os.pidfd_open(_pid(estimator))
    os.kill(_pid(estimator), signal.SIGKILL)
    assert _wait_for_end(pidfd)
    text = "今天天气很好"

    for _ in range(10):
        assert await _output_tokens(estimator, text) == guessed_tokens(text.encode())

    assert estimator.child_pid is None
    await estimator.aclose()


async def test_a_process_that_dies_under_an_estimate_leaves_a_guess() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=3600)
    await _output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    text = "今天天气很好"
    estimate = asyncio.ensure_future(_output_tokens(estimator, text))
    await _turn()
    os.kill(pid, signal.SIGKILL)

    assert await estimate == guessed_tokens(text.encode())
    await estimator.aclose()


async def test_a_process_without_work_is_ended() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=0, idle_s=0)

    for _ in range(2):
        assert await _output_tokens(estimator, "hello world") == 2
        await _until(lambda: estimator.child_pid is None)

    await estimator.aclose()


async def test_after_the_end_tokens_are_guessed() -> None:
    estimator = Estimator(timeout_s=PATIENT_S)
    await _output_tokens(estimator, "hi")
    pidfd = os.pidfd_open(_pid(estimator))
    text = "今天天气很好"

    await estimator.aclose()
    await estimator.aclose()

    assert _wait_for_end(pidfd)
    assert await _output_tokens(estimator, text) == guessed_tokens(text.encode())
    assert estimator.child_pid is None


async def test_the_end_does_not_wait_for_a_process_that_stands_still() -> None:
    estimator = Estimator(timeout_s=PATIENT_S)
    await _output_tokens(estimator, "hi")
    os.kill(_pid(estimator), signal.SIGSTOP)
    text = "今天天气很好" * 100_000  # more than a pipe holds
    estimates = [asyncio.ensure_future(_output_tokens(estimator, text)) for _ in range(3)]
    await _turn()

    started = time.monotonic()
    await estimator.aclose()

    assert await asyncio.gather(*estimates) == [guessed_tokens(text.encode())] * 3
    assert time.monotonic() - started < PATIENT_S / 2


async def test_signals_to_the_whole_group_do_not_end_it(patient: Estimator) -> None:
    pid = _pid(patient)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)

    assert await _output_tokens(patient, "hello world") == 2
    assert patient.child_pid == pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_nothing_of_a_text_can_be_seen_of_the_process(patient: Estimator) -> None:
    await _input_tokens(patient, Meter.CHAT, _chat("Schwertlilie " * 1000))
    proc = Path(f"/proc/{_pid(patient)}")

    seen = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()

    assert b"Schwertlilie" not in seen
    assert {entry.partition(b"=")[0] for entry in (proc / "environ").read_bytes().split(b"\0")} <= {b"PYTHONPATH", b""}
    assert [line.split()[4:6] for line in (proc / "limits").read_text().splitlines() if "core" in line] == [["0", "0"]]
    files = {os.readlink(fd).partition(":")[0] for fd in (proc / "fd").iterdir()}
    assert files <= {"pipe", "/dev/null"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd")
def test_the_process_ends_with_its_parent() -> None:
    script = (
        "import asyncio, sys\n"
        "from gateway.tests.test_estimation import Estimator, _output_tokens\n"
        "async def main():\n"
        f"    estimator = Estimator(timeout_s={PATIENT_S})\n"
        "    await _output_tokens(estimator, 'hi')\n"
        "    print(estimator.child_pid, flush=True)\n"
        "    sys.stdin.read()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()

    assert _wait_for_end(pidfd)


async def test_where_the_library_is_broken_tokens_are_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bpe_openai"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_bindings.py").write_text("raise ImportError('not for this machine')")
    monkeypatch.syspath_prepend(tmp_path)
    estimator = Estimator(timeout_s=PATIENT_S)

    # This process has the library imported already; the one that counts finds the broken one.
    assert await _output_tokens(estimator, "今天天气很好") == guessed_tokens("今天天气很好".encode())

    await estimator.aclose()


def test_where_the_library_is_not_installed_no_process_is_started() -> None:
    script = (
        "import asyncio, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'bpe_openai': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from gateway.estimation import Estimator, guessed_tokens\n"
        "from gateway.endpoints import Meter\n"
        "from gateway.usage.sample import OutputSample\n"
        "async def main():\n"
        "    estimator = Estimator()\n"
        "    usage = await estimator.estimate(meter=Meter.CHAT, model='', request_body=b'{}' * 40,\n"
        "                                     output=OutputSample('abcd' * 5, 1, 1))\n"
        "    print(usage.input_tokens, usage.output_tokens, estimator.child_pid, 'django' in sys.modules)\n"
        "    await estimator.aclose()\n"
        "asyncio.run(main())\n"
    )

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["20", "5", "None", "False"]


@pytest.mark.parametrize(
    "body",
    [
        _chat("x y " * (1 << 20))[:MOST_BODY_BYTES],
        _chat("今天" * (600 << 10)),
        _body(messages=[{}] * (1 << 20))[:MOST_BODY_BYTES],
        b'{"messages":' + b"[" * (MOST_BODY_BYTES - 100),
        _chat(SENTENCE * (1 << 20)),
    ],
    ids=["cut", "chinese", "objects", "brackets", "too-large"],
)
async def test_a_huge_body_is_estimated_in_bounded_time(body: bytes) -> None:
    estimator = Estimator()

    started, started_cpu = time.monotonic(), time.thread_time()
    tokens = await _input_tokens(estimator, Meter.CHAT, body)
    elapsed, elapsed_cpu = time.monotonic() - started, time.thread_time() - started_cpu

    assert tokens > 0
    # The estimator waits for two seconds; what others on a busy machine take comes on top.
    assert elapsed_cpu < 2
    assert elapsed < 20
    await estimator.aclose()


async def test_too_many_bytes_waiting_are_guessed() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, max_waiting=1000)
    await _output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    body = _body(prompt="今天天气很好" * 200_000)
    estimates = [asyncio.ensure_future(_input_tokens(estimator, Meter.COMPLETIONS, body)) for _ in range(20)]

    await _until(lambda: sum(task.done() for task in estimates) >= 10)
    os.kill(pid, signal.SIGCONT)

    counted = _counter()("今天天气很好" * 200_000)
    assert set(await asyncio.gather(*estimates)) == {counted, guessed_tokens(body)}
    assert await _output_tokens(estimator, "hello world") == 2
    await estimator.aclose()
