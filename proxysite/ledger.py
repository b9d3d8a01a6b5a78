"""The ledger as the gateway reaches it: through a process of its own, so that no request waits for a database.

In the worker itself a batch on its way into the database would hold Python's interpreter for milliseconds at a
time, in which no stream goes on. The other process also yields to traffic: what it has not recorded yet stands in
the journal.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import IO

import msgspec
from django.conf import settings
from django.db import connection

from billing import services
from gateway import segments

logger = logging.getLogger("proxysite.ledger")

_NICENESS = 10
_FAREWELL_SECONDS = 2.0
_LENGTH = struct.Struct("!I")
_encode = msgspec.msgpack.Encoder().encode


class Reply(msgspec.Struct):
    """What the process says of one batch, see `RecordResult` and `gateway.segments.Reading`.

    `failure` is "" or the name of what went wrong.
    """

    recorded: int = 0
    duplicates: int = 0
    rejected: int = 0
    corrupt: int = 0
    unreadable: list[bytes] = []
    failure: str = ""
    sums: dict[str, int] = {}


_reply_in = msgspec.msgpack.Decoder(Reply).decode


class LedgerError(Exception):
    """A batch was not recorded; the same batch may be given again."""


class LedgerProcess:
    """Records batches of events in a child process, which is started anew if it ends.

    `sums` grow with what has been recorded so: see `RecordResult`.
    """

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the process; does not wait until it is ready."""
        with self._lock:
            self._child = _started()

    def record(self, lines: bytes) -> Reply:
        """Record lines of the journal, as they are; waits for it. LedgerError while database or process is away."""
        with self._lock:
            child = self._child
            if child is None or child.poll() is not None:
                child = self._child = _started()
            try:
                _write(child.stdin, lines)
                reply = _reply_in(_read(child.stdout))
            except (OSError, EOFError, msgspec.MsgspecError) as exc:
                self._end()
                raise LedgerError("the ledger's process ended") from exc
        if reply.failure:
            raise LedgerError(reply.failure)
        self.sums.update(reply.sums)
        return reply

    def close(self) -> None:
        """End the process, once it has finished what it was given.

        A database that does not answer must not keep a worker for good: what was on its way stands in the journal.
        """
        if not self._lock.acquire(timeout=_FAREWELL_SECONDS):
            if (child := self._child) is not None:
                child.kill()
            return
        try:
            self._end()
        finally:
            self._lock.release()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _started() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "proxysite.ledger_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=settings.BASE_DIR,
    )


def _write(pipe: IO[bytes] | None, message: bytes) -> None:
    if pipe is None:
        raise EOFError
    pipe.write(_LENGTH.pack(len(message)))
    pipe.write(message)
    pipe.flush()


def _read(pipe: IO[bytes] | None) -> bytes:
    if pipe is None or len(head := pipe.read(_LENGTH.size)) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    if len(message := pipe.read(size)) < size:
        raise EOFError
    return message


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Be the process: record what comes until the other side is gone."""
    # The terminal's Ctrl-C and the master's signals are for the worker, which ends this process last.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    # A batch makes tens of thousands of tuples and no cycles: not to be looked for with every few hundred of them, nor
    # in what Django has loaded.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()
    with contextlib.suppress(EOFError, OSError):
        while True:
            _write(replies, _encode(_replied(_read(requests))))


def _replied(lines: bytes) -> Reply:
    try:
        return record(lines)
    except Exception as exc:  # the edge of the process: whatever it is, the journal keeps the events and tries again
        logger.warning("usage events were not recorded: %s: %s", type(exc).__name__, exc)
        return Reply(failure=type(exc).__name__)


def record(lines: bytes) -> Reply:
    """Record lines of the journal in this process; raises while the database is away."""
    reading = segments.read_lines(lines)
    done = services.RecordResult(0, 0, 0)
    if reading.events:
        with kept_connection():
            done = services.record_events(reading.events)
    return Reply(
        done.recorded, done.duplicates, done.rejected, reading.corrupt, reading.unreadable, sums=dict(done.sums)
    )


@contextlib.contextmanager
def kept_connection() -> Iterator[None]:
    """Work on this thread's connection, which stays open for the next time unless the work fails.

    Django closes connections after each request; to open SQLite's anew for every batch, and to write its log back
    into the database each time, takes longer than the batch.
    """
    try:
        connection.ensure_connection()
        connection.close_at = None
        yield
    except BaseException:
        connection.close()
        raise
