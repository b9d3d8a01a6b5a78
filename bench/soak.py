"""`python -m bench.soak`: half an hour of mixed load on the whole topology; nothing may grow, nothing may get lost.

80 % streams; clients that hang up and upstream faults among them. Exit status 1 when a gateway's worker grows by more
than 1 MB in 10 minutes after the warm-up, keeps more file descriptors, sends events late, fails without a reason, or
when the ledger is not exact: every request that the upstream answered, once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.crowd import CUT, HANG_UP, REFUSED, STREAM, WHOLE, Crowd, Kind, ledger_faults
from bench.faulty_upstream import FaultyUpstream
from deploy.processes import family
from deploy.topology import Topology

# Of 20 requests 16 are streams: 12 whole ones, 2 whose client hangs up, 2 that the upstream cuts.
KINDS: Sequence[Kind] = [STREAM] * 12 + [HANG_UP] * 2 + [CUT] * 2 + [WHOLE] * 3 + [REFUSED]
EVENTS, INTERVAL_S = 20, 0.05
SAMPLE_S = 5.0
WARM_UP_PART = 1 / 3
GROWTH_MOST_MB = 1.0  # in 10 minutes
DESCRIPTORS_MOST_MORE = 8
LATENESS_MOST_S = 0.25  # of the last of 100 events


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one worker."""

    at_s: float
    memory_bytes: int
    descriptors: int


def workers(topology: Topology) -> dict[int, str]:
    """Return the gateways' workers by process id: the masters' children that serve."""
    found = {}
    for gateway in topology.services["gateway"]:
        children = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
        found |= {int(child): f"{gateway.name}/{child}" for child in children}
    return found


def sample(pid: int, at_s: float) -> Sample:
    """Return what a worker has: its own memory that nobody shares, and its descriptors."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private_kb = sum(int(line.split()[1]) for line in rollup if line.startswith(("Private_Clean", "Private_Dirty")))
    return Sample(at_s, private_kb * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())))


def growth_mb(samples: Sequence[Sample]) -> float:
    """Return the slope of memory in MB per 10 minutes, by least squares."""
    slope = statistics.linear_regression([one.at_s for one in samples], [one.memory_bytes for one in samples]).slope
    return slope * 600 / 1e6


def descriptors_more(samples: Sequence[Sample]) -> float:
    """Return by how many descriptors the last third's median is above the first third's."""
    third = max(1, len(samples) // 3)
    counts = [one.descriptors for one in samples]
    return statistics.median(counts[-third:]) - statistics.median(counts[:third])


def watch(topology: Topology, minutes: float, tell: Callable[[str], None]) -> dict[int, list[Sample]]:
    """Look at the workers until the time is up."""
    history: dict[int, list[Sample]] = {pid: [] for pid in workers(topology)}
    started_at = time.monotonic()
    told_at = 0.0
    while (at_s := time.monotonic() - started_at) < minutes * 60:
        for pid, samples in history.items():
            samples.append(sample(pid, at_s))
        if at_s - told_at >= 60:
            told_at = at_s
            now = ", ".join(f"{samples[-1].memory_bytes / 1e6:.1f} MB" for samples in history.values())
            tell(f"{at_s / 60:5.1f} min  {now}")
        time.sleep(SAMPLE_S)
    return history


def findings_of(history: dict[int, list[Sample]], minutes: float, tell: Callable[[str], None]) -> list[str]:
    findings = []
    for pid, samples in history.items():
        settled = [one for one in samples if one.at_s >= minutes * 60 * WARM_UP_PART]
        grown_mb, more = growth_mb(settled), descriptors_more(settled)
        now_mb = settled[-1].memory_bytes / 1e6
        tell(f"worker {pid}: {grown_mb:+.2f} MB in 10 minutes, {more:+.0f} descriptors, {now_mb:.1f} MB")
        if grown_mb > GROWTH_MOST_MB:
            findings.append(f"worker {pid} grows by {grown_mb:.2f} MB in 10 minutes")
        if more > DESCRIPTORS_MOST_MORE:
            findings.append(f"worker {pid} has {more:.0f} more descriptors")
    return findings


def soak(minutes: float, clients: int, tell: Callable[[str], None]) -> list[str]:
    """Put the load on the topology for so long, and return what is wrong afterwards."""
    with FaultyUpstream(events=EVENTS, interval_s=INTERVAL_S) as upstream:
        gateways = [{"UPSTREAM_URL": f"{upstream.url}/g{number}"} for number in range(2)]
        with Topology({"HEARTBEAT_SECONDS": "10"}, gateways=gateways) as topology:
            before = set(workers(topology))
            with Crowd(topology, kinds=KINDS, clients=clients) as crowd:
                history = watch(topology, minutes, tell)
            findings = findings_of(history, minutes, tell)
            if set(workers(topology)) != before:
                findings.append("a worker was started anew")
            findings += _traffic_findings(crowd, tell)
            processes = len(family(topology.one("gateway").pid))
            tell(f"{processes} processes in a gateway; {len(upstream.answered)} requests answered by the upstream")
            return findings + ledger_faults(topology, crowd, also=frozenset(upstream.answered))


def _traffic_findings(crowd: Crowd, tell: Callable[[str], None]) -> list[str]:
    failed = [seen for seen in crowd.seen if seen.kind.is_to_succeed and not seen.is_complete]
    lateness_s = sorted(crowd.lateness_s)
    p99_s = lateness_s[int(len(lateness_s) * 0.99)]
    late = f"lateness p99 {p99_s * 1000:.0f} ms, most {lateness_s[-1] * 1000:.0f} ms"
    tell(f"{len(crowd.seen)} requests, {len(lateness_s)} events, {late}")
    findings = []
    if failed:
        findings.append(f"{len(failed)} requests failed, such as {failed[0].failure}")
    if p99_s > LATENESS_MOST_S:
        findings.append(f"events are {p99_s * 1000:.0f} ms late")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    findings = soak(options.minutes, options.clients, lambda line: print(line, flush=True))
    print("; ".join(findings) or "nothing grew, nothing was late, the ledger is exact")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
