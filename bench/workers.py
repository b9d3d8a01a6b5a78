"""What a second worker brings: `python -m bench.workers`.

One worker on one CPU, two workers on the same one CPU, two workers on two. The load and the upstream have the other
CPUs, or, where there is none left, share the second: then that line shows what is left to share, not what two
workers can do. What makes workers stand in each other's way (the journal, the database's one writer) costs CPU or
waits, so it shows on one CPU, too: there two workers should answer as many requests as one, at the same price. That
price has all of the recording in it: it is waited for.

Where control groups can be made, also one worker, and two, with two fifths of a CPU for each: then two CPUs are enough
for a load that is not the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import load, report
from bench.__main__ import raise_open_files
from bench.processes import ProcessError, busy_s, children_of, cpu_s, tree_of
from bench.proxies import Target, Upstream, fake_upstream, find_tool, launch_gateway, proxy
from bench.shares import can_share, put, share_of_cpu

CONNECTIONS = 32
BAR_TIMES = 1.8
DISTURBED_AT = 0.1
SETTLED_WITHIN_S = 60.0
IDLE_AFTER_S, IDLE_FOR_S = 15.0, 5.0
BARELY_S = 0.01
SHARE = 0.4
# Two at the price of one: 1.8 times as many from twice the CPU.
BAR_PRICE = 2 / BAR_TIMES


@dataclass(frozen=True, slots=True)
class Found:
    """Medians of all rounds."""

    workers: int
    cpus: float
    requests_per_s: float
    cpu_us_per_request: float
    load_cpu_percent: float  # of load and upstream together, of one CPU
    foreign: float  # the largest share of all CPUs that went to something else


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__)
    parser.add_argument("--seconds", type=int, default=5, help="of load, each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    wrk = find_tool("wrk")
    if wrk is None or len(cpus) < 2:
        print("bench.workers needs wrk (apt-get install wrk) and two CPUs", file=sys.stderr)
        return 2
    gateways, others = cpus[:2], cpus[2:] or cpus[1:2]
    os.sched_setaffinity(0, set(others))
    raise_open_files()
    about = report.machine()
    with tempfile.TemporaryDirectory(prefix="bench-workers-") as temp:
        script = Path(temp) / "post.lua"
        script.write_text(load.WRK_SCRIPT % load.CHAT_BODY)
        try:
            with fake_upstream(Path(temp), cpu=others[-1]) as upstream:
                lay_outs = [(1, gateways[:1]), (2, gateways[:1]), (2, gateways)]
                measure = partial(_measured, upstream, wrk=wrk, script=script, options=options, work_dir=Path(temp))
                found = [measure(workers=workers, cpus=chosen) for workers, chosen in lay_outs]
                parts = [measure(workers=workers, cpus=gateways[:1], share=SHARE) for workers in (1, 2) if can_share()]
        except (ProcessError, load.LoadError) as exc:
            print(exc, file=sys.stderr)
            return 1
    return _told(found, parts, has_own_cpus=len(cpus) > 2, about=about, check=options.check)


def _measured(
    upstream: Upstream,
    *,
    workers: int,
    cpus: Sequence[int],
    wrk: str,
    script: Path,
    options: argparse.Namespace,
    work_dir: Path,
    share: float = 0.0,
) -> Found:
    name = f"{workers} on {share or len(cpus)}"
    print(f"{name} CPU …", file=sys.stderr, flush=True)
    launcher = partial(launch_gateway, workers=workers)
    rounds = []
    with ExitStack() as stack:
        groups = [stack.enter_context(share_of_cpu(share)) for _ in range(workers if share else 0)]
        target = stack.enter_context(proxy(name, work_dir / name, upstream, "http", cpu=cpus[0], launcher=launcher))
        _spread(target, cpus)
        if groups:
            assert target.pid is not None
            for group, worker in zip(groups, children_of(target.pid), strict=True):
                put(group, tree_of(worker))
        ask = partial(load.closed_loop, target.address, connections=CONNECTIONS, wrk=wrk, script=script)
        ask(seconds=2)
        idle_share = _idle_share(target)
        for _ in range(options.rounds):
            rounds.append(_round(partial(ask, seconds=options.seconds), target, upstream, idle_share=idle_share))
    columns = list(zip(*rounds, strict=True))
    per_s, price, load_percent = (statistics.median(column) for column in columns[:3])
    return Found(workers, workers * share or len(cpus), per_s, price, load_percent, foreign=max(columns[3]))


def _idle_share(target: Target) -> float:
    """Return what a gateway takes of a CPU once it has recorded all it was asked, and is asked nothing."""
    assert target.pid is not None
    time.sleep(IDLE_AFTER_S)
    before_s = cpu_s(target.pid)
    time.sleep(IDLE_FOR_S)
    return (cpu_s(target.pid) - before_s) / IDLE_FOR_S


def _round(
    ask: partial[load.Loop], target: Target, upstream: Upstream, *, idle_share: float
) -> tuple[float, float, float, float]:
    assert target.pid is not None
    all_cpus = range(os.cpu_count() or 1)
    before_s, load_before_s, began_s = cpu_s(target.pid), _load_cpu_s(upstream), time.monotonic()
    busy_before_s = sum(map(busy_s, all_cpus))
    loop = ask()
    took_s = time.monotonic() - began_s
    load_spent_s = _load_cpu_s(upstream) - load_before_s
    ours_s = cpu_s(target.pid) - before_s + load_spent_s
    foreign = (sum(map(busy_s, all_cpus)) - busy_before_s - ours_s) / (took_s * len(all_cpus))
    spent_s = _settled_cpu_s(target.pid, idle_share) - before_s
    spent_s -= idle_share * (time.monotonic() - began_s)
    return loop.requests / loop.seconds, spent_s / loop.requests * 1e6, 100 * load_spent_s / took_s, foreign


def _settled_cpu_s(pid: int, idle_share: float) -> float:
    """Return the CPU that a gateway has spent once it has recorded what it was asked."""
    deadline_s = time.monotonic() + SETTLED_WITHIN_S
    before_s = now_s = cpu_s(pid)
    while time.monotonic() < deadline_s:
        time.sleep(1)
        now_s = cpu_s(pid)
        if now_s - before_s < 1.5 * idle_share + BARELY_S:
            break
        before_s = now_s
    return now_s


def _load_cpu_s(upstream: Upstream) -> float:
    mine = os.times()  # wrk has ended, and is among the children
    return mine.user + mine.system + mine.children_user + mine.children_system + cpu_s(upstream.pid)


def _spread(target: Target, cpus: Sequence[int]) -> None:
    """Let the processes of a gateway have these CPUs, all their threads included."""
    assert target.pid is not None
    for pid in tree_of(target.pid):
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), set(cpus))


def _told(
    found: Sequence[Found], parts: Sequence[Found], *, has_own_cpus: bool, about: dict[str, str], check: bool
) -> int:
    one, shared, two = found
    print(
        "| workers | CPUs | requests/s | CPU per request, µs | CPU of load and upstream, % of one |\n"
        "|---:|---:|---:|---:|---:|"
    )
    for line in (*found, *parts):
        print(
            f"| {line.workers} | {line.cpus} | {line.requests_per_s:,.0f} | {line.cpu_us_per_request:.0f} "
            f"| {line.load_cpu_percent:.0f} |"
        )
    times, price = two.requests_per_s / one.requests_per_s, shared.cpu_us_per_request / one.cpu_us_per_request
    print(f"\n{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, {about['taken_at']}\n")
    print(f"- two workers on one CPU: {price:.2f} times the price of a request (bar: at most {BAR_PRICE:.2f})")
    if has_own_cpus:
        print(f"- two workers on two CPUs: {times:.2f} times the requests (bar: at least {BAR_TIMES})")
    else:
        print(
            f"- two workers on two CPUs: {times:.2f} times the requests, beside load and upstream on one of them: "
            "this machine cannot show more; from three CPUs on it is measured"
        )
    part_times = 0.0
    if parts:
        part_times = parts[1].requests_per_s / parts[0].requests_per_s
        print(f"- two workers, {SHARE} of a CPU each: {part_times:.2f} times the requests (bar: at least {BAR_TIMES})")
    if (foreign := max(line.foreign for line in (*found, *parts))) > DISTURBED_AT:
        print(f"- disturbed: something else had up to {foreign:.0%} of the CPUs; the figures above say nothing")
    missed = price > BAR_PRICE or (has_own_cpus and times < BAR_TIMES) or (bool(parts) and part_times < BAR_TIMES)
    return 1 if check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
