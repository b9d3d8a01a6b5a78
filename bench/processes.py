"""Child processes, each pinned to one CPU, and what their trees cost; all of them end with the bench."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
STOP_TIMEOUT_S = 15.0


class ProcessError(Exception):
    """A process of ours did not start, or ended too early; the text holds the end of its log."""


@contextmanager
def running(
    argv: Sequence[str], *, cpu: int, log: Path, env: Mapping[str, str], cwd: Path, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run argv on one CPU in a session of its own (Ctrl-C is ours to pass on); end its tree at exit."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        os.sched_setaffinity(0, {cpu})
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # should the bench be killed

    with log.open("ab") as out:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=out if stdout is None else stdout,
            stderr=out,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
            preexec_fn=prepare,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process by SIGTERM, then whatever is left of its session by SIGKILL."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    # Members of the session that we made, so never a stranger who was given a used id.
    for pid in session_of(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _stat_fields(pid: int) -> list[str]:
    """Return /proc/<pid>/stat from the state on (the name before it may hold spaces); empty when gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _all_stats() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat_fields(int(entry.name))):
            yield int(entry.name), fields


def session_of(leader_pid: int) -> list[int]:
    """Return the processes of the session that leader_pid began."""
    return [pid for pid, fields in _all_stats() if int(fields[3]) == leader_pid]


def children_of(pid: int) -> list[int]:
    """Return the processes that pid has started."""
    return [child for child, fields in _all_stats() if int(fields[1]) == pid]


def tree_of(root_pid: int) -> list[int]:
    """Return root_pid and all its descendants."""
    children: dict[int, list[int]] = {}
    for pid, fields in _all_stats():
        children.setdefault(int(fields[1]), []).append(pid)
    tree = [root_pid]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def cpu_s(root_pid: int) -> float:
    """Return user plus system CPU time of the tree's living processes, in seconds, to the ns.

    Read from each process's CPU clock (clock_getcpuclockid(3)): the ticks of /proc/<pid>/stat are 10 ms.
    """
    total_s = 0.0
    for pid in tree_of(root_pid):
        try:
            total_s += time.clock_gettime((~pid << 3) | 2)
        except OSError:  # gone since it was listed
            continue
    return total_s


def busy_s(cpu: int) -> float:
    """Return how long one CPU has been busy with anything, stolen by other machines included, in seconds, to 10 ms."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{cpu}":
            user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, ticks[:8])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    raise ProcessError(f"there is no CPU {cpu}")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process tree, in bytes; what processes share is divided up in pss, counted in each in rss."""

    rss_bytes: int
    pss_bytes: int


def memory_of(root_pid: int) -> Memory:
    rss = pss = 0
    for pid in tree_of(root_pid):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        kb = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        rss += kb["Rss:"] * 1024
        pss += kb["Pss:"] * 1024
    return Memory(rss, pss)


def reset_peaks(root_pid: int) -> int:
    """Make peak_rss start anew; return the tree's RSS as it is, in bytes."""
    for pid in tree_of(root_pid):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_rss(root_pid)


def peak_rss(root_pid: int) -> int:
    """Return the sum of each process's highest RSS since reset_peaks, in bytes."""
    total = 0
    for pid in tree_of(root_pid):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total
