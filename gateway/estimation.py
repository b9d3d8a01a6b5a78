"""Tokens of a request for which the upstream reported no usage: counted in a process of its own, or else guessed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from billing.events import Usage
from gateway.endpoints import Meter
from gateway.estimator_process import (
    OUTPUT_METERS,
    PROMPT_METERS,
    Counts,
    Job,
    encoding_name,
    extrapolated,
    receive_counts,
    send_job,
)
from gateway.usage import OutputSample
from gateway.usage.guess import guessed_tokens

logger = logging.getLogger(__name__)

MOST_BODY_BYTES = 4 << 20
# Waiting texts are held in memory; beyond this a guess has to do.
MOST_WAITING_BYTES = 32 << 20
_ROOT = str(Path(__file__).resolve().parents[1])


class Estimator:
    """Estimates usage for one worker. The process that counts is started on first need, and again after a crash.

    `timeout_s` bounds an estimate, `max_waiting` how many may wait; beyond either the tokens are guessed. A process
    is started at most every `restart_s`, and ended after `idle_s` without work.
    """

    def __init__(
        self, *, timeout_s: float = 2.0, max_waiting: int = 64, restart_s: float = 5.0, idle_s: float = 600.0
    ) -> None:
        self._timeout_s = timeout_s
        self._service = _Service(max_waiting=max_waiting, restart_s=restart_s, idle_s=idle_s)
        self._waiting_bytes = 0

    @property
    def child_pid(self) -> int | None:
        """The process that counts, None if there is none."""
        return self._service.pid

    async def estimate(
        self, *, meter: Meter, model: str, request_body: bytes | None, output: OutputSample, input_guess: int = 0
    ) -> Usage:
        """Return input and output tokens, as far as there is something to count. Never raises.

        A body that is None, or of a form with a file in it, counts nothing. `input_guess` are the tokens of a body
        that was too long to be held.
        """
        body = (request_body or b"") if meter in PROMPT_METERS else b""
        text = output.text.encode("utf-8", "replace") if meter in OUTPUT_METERS else b""
        fits = len(body) <= MOST_BODY_BYTES
        counts = await self._counted(Job(meter, encoding_name(model), body if fits else b"", text))
        if counts is None:
            counts = Counts(guessed_tokens(body), guessed_tokens(text))
        elif not fits:
            counts = Counts(guessed_tokens(body), counts.output_tokens)
        tokens = extrapolated(counts.output_tokens, seen=output.seen_bytes, kept=output.kept_bytes)
        return Usage(input_tokens=counts.input_tokens + input_guess, output_tokens=tokens)

    async def aclose(self) -> None:
        """End the process. Estimates that still wait, or come later, are guessed."""
        await asyncio.to_thread(self._service.close)

    async def _counted(self, job: Job) -> Counts | None:
        size = len(job.body) + len(job.text)
        if not size:
            return Counts()
        if self._waiting_bytes + size > MOST_WAITING_BYTES:
            return None
        ticket = _Ticket(job)
        if not self._service.offer(ticket):
            return None
        self._waiting_bytes += size
        try:
            async with asyncio.timeout(self._timeout_s):
                return await ticket.counts
        except TimeoutError:
            return None
        finally:
            self._waiting_bytes -= size
            ticket.job = None  # it may stay in the queue for a while


class _Ticket:
    """A job that waits. `job` is None once nobody waits for it."""

    __slots__ = ("_loop", "counts", "job")

    def __init__(self, job: Job) -> None:
        self.job: Job | None = job
        self._loop = asyncio.get_running_loop()
        self.counts: asyncio.Future[Counts | None] = self._loop.create_future()

    def answer(self, counts: Counts | None) -> None:
        """Hand over the counts; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._resolve, counts)

    def _resolve(self, counts: Counts | None) -> None:
        if not self.counts.done():
            self.counts.set_result(counts)


class _Service:
    """The process that counts, and the thread that talks to it.

    The thread asks one thing at a time and waits for the answer even if nobody else does any more: no answer can
    be taken for that to another question. It does so on blocking pipes, outside of any event loop.
    """

    def __init__(self, *, max_waiting: int, restart_s: float, idle_s: float) -> None:
        self._restart_s = restart_s
        self._idle_s = idle_s
        self._waiting: queue.Queue[_Ticket | None] = queue.Queue(max_waiting)
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_installed: bool | None = None
        self._not_before = 0.0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def offer(self, ticket: _Ticket) -> bool:
        """Return whether the ticket will be answered."""
        if self._is_installed is None:
            self._is_installed = _is_installed()
        if self._is_closed or not self._is_installed:
            return False
        try:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="token-counter", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.put_nowait(ticket)
        except (queue.Full, RuntimeError):  # too many wait, or there can be no more threads
            return False
        return True

    def close(self) -> None:
        """End process and thread; what waits is answered with None. Blocks for a moment."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._is_closed:
            try:
                ticket = self._waiting.get(timeout=self._idle_s if self._process else None)
            except queue.Empty:
                self._end_process()
                continue
            if ticket is not None:
                ticket.answer(self._counted(ticket.job))
        self._end_process()
        with contextlib.suppress(queue.Empty):
            while True:
                ticket = self._waiting.get_nowait()
                if ticket is not None:
                    ticket.answer(None)

    def _counted(self, job: Job | None) -> Counts | None:
        if job is None:
            return None
        try:
            process = self._running()
            if process is None or process.stdin is None or process.stdout is None:
                return None
            send_job(process.stdin, job)
            return receive_counts(process.stdout)
        except Exception as exc:  # whatever is wrong with the process: the thread goes on, and the text into no log
            self._report_end(type(exc).__name__, self._end_process())
            return None

    def _running(self) -> subprocess.Popen[bytes] | None:
        """Return the process, started if need be; None if it is too early for another start."""
        if self._process is not None and self._process.poll() is not None:
            self._report_end("died", self._end_process())
        with self._lock:
            if self._process is None and not self._is_closed and time.monotonic() >= self._not_before:
                self._not_before = time.monotonic() + self._restart_s
                self._process = _start_process()
            return self._process

    def _end_process(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _report_end(self, what: str, status: int | None) -> None:
        if not self._is_closed:
            logger.warning("The token counter failed (%s, exit status %s); tokens are guessed meanwhile", what, status)


def _is_installed() -> bool:
    try:
        found = importlib.util.find_spec("bpe_openai") is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        logger.warning("bpe-openai is not installed: where no usage is reported, tokens are guessed from the length")
    return found


def _start_process() -> subprocess.Popen[bytes]:
    # The path of this process and nothing else of its environment: no secret needs to be there twice.
    path = os.pathsep.join(dict.fromkeys([_ROOT, *(os.path.abspath(place) for place in sys.path)]))
    return subprocess.Popen(
        [sys.executable, "-P", "-B", "-m", "gateway.estimator_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": path},
    )
