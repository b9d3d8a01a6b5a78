"""The process that counts: begun when it is needed, guessed for where it is slow, dead or away."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.estimation import MOST_BODY_BYTES, Estimator, guessed_tokens
from gateway.tests.estimates import (
    NOTHING,
    PATIENT_S,
    SENTENCE,
    chat_body,
    input_tokens,
    json_body,
    library,
    output_tokens,
    own_counter,
)

ROOT = str(Path(__file__).resolve().parents[2])


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


async def test_there_is_no_process_until_something_is_to_be_counted() -> None:
    estimator = Estimator()

    for meter in Meter:
        assert await estimator.estimate(meter=meter, model="", request_body=None, output=NOTHING) == Usage()
    for meter in (Meter.NONE, Meter.BATCH, Meter.STORED, Meter.IMAGES, Meter.SPEECH):
        assert await input_tokens(estimator, meter, chat_body("hi")) == 0

    assert estimator.child_pid is None
    await estimator.aclose()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_either_loop_will_do(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def use() -> tuple[int, int | None]:
        estimator = Estimator(timeout_s=PATIENT_S)
        tokens = await input_tokens(estimator, Meter.CHAT, chat_body("hi"))
        assert estimator.child_pid is not None
        await estimator.aclose()
        return tokens, estimator.child_pid

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(use()) == (8, None)


async def test_a_hundred_at_once_are_all_counted() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, max_waiting=100)
    texts = [SENTENCE * n for n in range(1, 101)]

    counts = await asyncio.gather(*(output_tokens(estimator, text) for text in texts))

    assert counts == [library("o200k_base")(text) for text in texts]
    await estimator.aclose()


async def test_what_finds_no_place_to_wait_is_guessed_at_once() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, max_waiting=2)
    await output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    text = "今天天气很好"
    waiting = [asyncio.ensure_future(output_tokens(estimator, text)) for _ in range(50)]

    # One may be under way and two wait: the others do not wait for the process, which stands still.
    await _until(lambda: sum(task.done() for task in waiting) >= 47)
    os.kill(pid, signal.SIGCONT)
    counts = await asyncio.gather(*waiting)

    counted, guessed = library("o200k_base")(text), guessed_tokens(text.encode())
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
    guessed = await output_tokens(estimator, text)

    assert guessed == guessed_tokens(text.encode()) != library("o200k_base")(text)
    # Until it goes on, that would be for ever.
    assert 0.1 < time.monotonic() - started < PATIENT_S / 2
    os.kill(pid, signal.SIGCONT)
    await _recovered(estimator, text)
    assert estimator.child_pid == pid
    await estimator.aclose()


async def _recovered(estimator: Estimator, text: str) -> None:
    """Ask until the answer is counted, not guessed."""
    async with asyncio.timeout(PATIENT_S):
        while await output_tokens(estimator, text) != library("o200k_base")(text):
            pass


async def test_what_was_given_up_is_not_taken_for_the_next_answer() -> None:
    estimator = Estimator(timeout_s=PATIENT_S)
    await output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    texts = [SENTENCE * n for n in range(1, 21)]
    tasks = [asyncio.ensure_future(output_tokens(estimator, text)) for text in texts]
    await _turn()
    for task in tasks[::2]:
        task.cancel()
    os.kill(pid, signal.SIGCONT)

    counts = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(count, asyncio.CancelledError) for count in counts[::2])
    assert counts[1::2] == [library("o200k_base")(text) for text in texts[1::2]]
    assert await output_tokens(estimator, "hello world") == 2
    assert estimator.child_pid == pid
    await estimator.aclose()


async def test_a_killed_process_is_replaced_by_guesses_and_then_by_another_one() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=0)
    await output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGKILL)
    text = "今天天气很好"
    possible = {library("o200k_base")(text), guessed_tokens(text.encode())}

    assert await output_tokens(estimator, text) in possible
    await _recovered(estimator, text)

    assert estimator.child_pid not in (None, pid)
    await estimator.aclose()


async def test_a_process_is_not_started_again_at_once() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=3600)
    await output_tokens(estimator, "hi")
    pidfd = os.pidfd_open(_pid(estimator))
    os.kill(_pid(estimator), signal.SIGKILL)
    assert _wait_for_end(pidfd)
    text = "今天天气很好"

    for _ in range(10):
        assert await output_tokens(estimator, text) == guessed_tokens(text.encode())

    assert estimator.child_pid is None
    await estimator.aclose()


async def test_a_process_that_dies_under_an_estimate_leaves_a_guess() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=3600)
    await output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    text = "今天天气很好"
    estimate = asyncio.ensure_future(output_tokens(estimator, text))
    await _turn()
    os.kill(pid, signal.SIGKILL)

    assert await estimate == guessed_tokens(text.encode())
    await estimator.aclose()


async def test_a_process_without_work_is_ended() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, restart_s=0, idle_s=0)

    for _ in range(2):
        assert await output_tokens(estimator, "hello world") == 2
        await _until(lambda: estimator.child_pid is None)

    await estimator.aclose()


async def test_after_the_end_tokens_are_guessed() -> None:
    estimator = Estimator(timeout_s=PATIENT_S)
    await output_tokens(estimator, "hi")
    pidfd = os.pidfd_open(_pid(estimator))
    text = "今天天气很好"

    await estimator.aclose()
    await estimator.aclose()

    assert _wait_for_end(pidfd)
    assert await output_tokens(estimator, text) == guessed_tokens(text.encode())
    assert estimator.child_pid is None


async def test_the_end_does_not_wait_for_a_process_that_stands_still() -> None:
    estimator = Estimator(timeout_s=PATIENT_S)
    await output_tokens(estimator, "hi")
    os.kill(_pid(estimator), signal.SIGSTOP)
    text = "今天天气很好" * 100_000  # more than a pipe holds
    estimates = [asyncio.ensure_future(output_tokens(estimator, text)) for _ in range(3)]
    await _turn()

    started = time.monotonic()
    await estimator.aclose()

    assert await asyncio.gather(*estimates) == [guessed_tokens(text.encode())] * 3
    assert time.monotonic() - started < PATIENT_S / 2


async def test_signals_to_the_whole_group_do_not_end_it(patient: Estimator) -> None:
    pid = _pid(patient)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)

    assert await output_tokens(patient, "hello world") == 2
    assert patient.child_pid == pid


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_nothing_of_a_text_can_be_seen_of_the_process(patient: Estimator) -> None:
    await input_tokens(patient, Meter.CHAT, chat_body("Schwertlilie " * 1000))
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
        "from gateway.estimation import Estimator\n"
        "from gateway.tests.estimates import output_tokens\n"
        "async def main():\n"
        f"    estimator = Estimator(timeout_s={PATIENT_S})\n"
        "    await output_tokens(estimator, 'hi')\n"
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
    assert await output_tokens(estimator, "今天天气很好") == guessed_tokens("今天天气很好".encode())

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
        chat_body("x y " * (1 << 20))[:MOST_BODY_BYTES],
        chat_body("今天" * (600 << 10)),
        json_body(messages=[{}] * (1 << 20))[:MOST_BODY_BYTES],
        b'{"messages":' + b"[" * (MOST_BODY_BYTES - 100),
        chat_body(SENTENCE * (1 << 20)),
    ],
    ids=["cut", "chinese", "objects", "brackets", "too-large"],
)
async def test_a_huge_body_is_estimated_in_bounded_time(body: bytes) -> None:
    estimator = Estimator()

    started, started_cpu = time.monotonic(), time.thread_time()
    tokens = await input_tokens(estimator, Meter.CHAT, body)
    elapsed, elapsed_cpu = time.monotonic() - started, time.thread_time() - started_cpu

    assert tokens > 0
    # The estimator waits for two seconds; what others on a busy machine take comes on top.
    assert elapsed_cpu < 2
    assert elapsed < 20
    await estimator.aclose()


async def test_too_many_bytes_waiting_are_guessed() -> None:
    estimator = Estimator(timeout_s=PATIENT_S, max_waiting=1000)
    await output_tokens(estimator, "hi")
    pid = _pid(estimator)
    os.kill(pid, signal.SIGSTOP)
    body = json_body(prompt="今天天气很好" * 200_000)
    estimates = [asyncio.ensure_future(input_tokens(estimator, Meter.COMPLETIONS, body)) for _ in range(20)]

    await _until(lambda: sum(task.done() for task in estimates) >= 10)
    os.kill(pid, signal.SIGCONT)

    counted = own_counter()("今天天气很好" * 200_000)
    assert set(await asyncio.gather(*estimates)) == {counted, guessed_tokens(body)}
    assert await output_tokens(estimator, "hello world") == 2
    await estimator.aclose()
