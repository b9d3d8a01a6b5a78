"""Lines of the journal on their way into the ledger."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from billing.models import UsageRecord
from gateway.segments import encode_line
from gateway.tests.test_segments import usage_event
from proxysite import ledger

NOW_S = time.time()


@pytest.mark.django_db
def test_lines_are_recorded_each_once_and_what_is_none_is_told_apart() -> None:
    good = encode_line(usage_event(1, started_at=NOW_S))
    foreign = encode_line(usage_event(2, outcome="eaten_by_a_dog"))
    unusable = encode_line(usage_event(3, started_at=5.0))
    reply = ledger.record(good + b"damaged\n" + foreign + good + unusable)
    assert (reply.recorded, reply.duplicates, reply.rejected) == (1, 1, 1)
    assert (reply.corrupt, reply.unreadable) == (1, [foreign])
    assert reply.sums["requests"] == 1
    assert UsageRecord.objects.get().pk == usage_event(1).id
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=ledger.Reply) == reply


def test_lines_without_an_event_need_no_database() -> None:
    # Without the django_db mark every access to the database raises.
    assert ledger.record(b"damaged\n").corrupt == 1


def children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def test_a_process_that_waits_for_a_database_that_does_not_answer_keeps_nobody() -> None:
    process, before = ledger.LedgerProcess(), children()
    process.start()
    (child,) = children() - before
    os.kill(child, signal.SIGSTOP)  # as if a table were locked, or the database's machine gone
    with ThreadPoolExecutor(1) as journal:
        recording = journal.submit(process.record, b"damaged\n")
        while not process._lock.locked():
            os.sched_yield()
        process.close()
        with pytest.raises(ledger.LedgerError):
            recording.result(60)
    assert child not in children()
