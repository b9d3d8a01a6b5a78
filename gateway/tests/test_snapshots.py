from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from gateway.snapshots import Snapshot, SnapshotFile, summed_up

FORK = multiprocessing.get_context("fork")


def snapshot(requests: int) -> Snapshot:
    return Snapshot({("requests",): requests}, {("wait", "/v1"): [requests, 0, 2.5]}, {("open",): requests})


def work(directory: Path, requests: int, ready: object, until: object) -> None:
    file = SnapshotFile(directory)
    file.write(snapshot(requests))
    ready.set()  # type: ignore[attr-defined]
    until.wait(300)  # type: ignore[attr-defined]


class Worker:
    """A process that has written down `requests` and lives until it is killed."""

    def __init__(self, directory: Path, requests: int) -> None:
        ready = FORK.Event()
        self.process = FORK.Process(target=work, args=(directory, requests, ready, FORK.Event()), daemon=True)
        self.process.start()
        assert ready.wait(60)

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(60)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.snapshot"))


def test_workers_are_summed_up_and_one_that_writes_again_counts_once(tmp_path: Path) -> None:
    first, second = SnapshotFile(tmp_path), SnapshotFile(tmp_path)
    for requests in (1, 2, 3):
        first.write(snapshot(requests))
    second.write(snapshot(10))
    total = summed_up(tmp_path)
    assert total.counters == {("requests",): 13}
    assert total.histograms == {("wait", "/v1"): [13, 0, 5.0]}
    assert total.gauges == {("open",): 13}
    assert summed_up(tmp_path) == total
    first.close()
    second.close()


def test_a_killed_worker_keeps_its_counts_and_loses_what_it_held(tmp_path: Path) -> None:
    worker, ours = Worker(tmp_path, 5), SnapshotFile(tmp_path)
    ours.write(snapshot(2))
    assert summed_up(tmp_path).gauges == {("open",): 7}
    assert len(files(tmp_path)) == 2
    worker.kill()
    for _ in range(3):
        total = summed_up(tmp_path)
        assert (total.counters, total.gauges) == ({("requests",): 7}, {("open",): 2})
        assert total.histograms == {("wait", "/v1"): [7, 0, 5.0]}
    assert len(files(tmp_path)) == 1
    ours.close()


def test_nothing_counts_twice_where_a_burial_was_interrupted(tmp_path: Path) -> None:
    gone = SnapshotFile(tmp_path)
    gone.write(snapshot(4))
    name = files(tmp_path)[0]
    content = (tmp_path / name).read_bytes()
    gone.close()
    assert summed_up(tmp_path).counters == {("requests",): 4}
    (tmp_path / name).write_bytes(content)  # as if it had not been removed any more
    assert summed_up(tmp_path).counters == {("requests",): 4}
    assert files(tmp_path) == []


def test_many_generations_of_workers_leave_two_files(tmp_path: Path) -> None:
    for generation in range(1, 20):
        file = SnapshotFile(tmp_path)
        file.write(snapshot(1))
        file.close()
        assert summed_up(tmp_path).counters == {("requests",): generation}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead.total", "lock"]


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x93\x01\x02\x03", b"{}"])
def test_a_damaged_file_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "7-x.snapshot").write_bytes(content)
    file = SnapshotFile(tmp_path)
    file.write(snapshot(1))
    (tmp_path / "dead.total").write_bytes(content)
    assert summed_up(tmp_path).counters == {("requests",): 1}
    file.close()


def test_a_histogram_of_other_buckets_starts_anew() -> None:
    total = snapshot(1)
    total.add(Snapshot({}, {("wait", "/v1"): [1, 2]}), with_gauges=False)
    assert total.histograms == {("wait", "/v1"): [1, 2]}


def test_no_sum_goes_back_while_workers_come_and_go_and_others_sum_up(tmp_path: Path) -> None:
    stop = FORK.Event()
    others = [FORK.Process(target=sum_up_until, args=(tmp_path, stop), daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    seen = 0.0
    for generation in range(60):
        file = SnapshotFile(tmp_path)
        for requests in (1, 2):
            file.write(snapshot(requests))
            total = summed_up(tmp_path).counters.get(("requests",), 0)
            assert total == generation * 2 + requests
            assert total >= seen
            seen = total
        file.close()
    stop.set()
    for other in others:
        other.join(60)
        assert other.exitcode == 0


def sum_up_until(directory: Path, stop: object) -> None:
    while not stop.is_set():  # type: ignore[attr-defined]
        summed_up(directory)
