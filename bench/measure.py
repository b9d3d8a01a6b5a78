"""The measurements: each takes the targets side by side and returns figures by target's name.

A figure is None where a target could not do it; the reason goes to the notes.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from bench import load
from bench.load import LoadError
from bench.processes import busy_s, cpu_s, memory_of, peak_rss, reset_peaks
from bench.proxies import Target, Upstream

Figures = dict[str, float | None]
Start = Callable[[str], AbstractContextManager[Target]]

LATENESS_BAR_MS = 250.0
STREAM_RATE_PER_S = 20
SETTLE_S = 0.5
SETTLED_AT = 0.03  # of a CPU
SETTLED_TRIES = 40
ARRIVED_AT_LEAST = 0.97  # of the events due in a window: its two ends cut some off
DISTURBED_AT = 0.1  # see Bench.foreign_most; interrupts and the other, idle proxies make some percent


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything; the full plan takes minutes, the quick one shows that all of it works."""

    rounds: int = 3
    loop_connections: int = 32
    loop_s: int = 3
    chunk_streams: int = 200
    chunk_events: int = 100
    latency_rate_per_s: int = 50
    latency_s: float = 3.0
    held_levels: tuple[int, ...] = (1000, 1500, 2000, 2500)
    held_tries: int = 2  # one hiccup of the machine is not a proxy's limit
    held_s: float = 3.0
    idle_streams: int = 1000
    bulk_bytes: int = 100_000_000
    conversations: int = 500
    conversation_streams: int = 100


FULL = Plan()
QUICK = Plan(
    rounds=1,
    loop_s=2,
    chunk_events=40,
    latency_s=1.5,
    held_levels=(1000, 2000),
    held_tries=1,
    held_s=2.0,
    idle_streams=300,
    bulk_bytes=20_000_000,
)


@dataclass(slots=True)
class Bench:
    """What every measurement needs, and where it tells of trouble."""

    plan: Plan
    wrk: str
    wrk_script: Path
    upstream: Upstream
    notes: list[str] = field(default_factory=list)
    proxy_cpu: int = 0
    foreign_most: float = 0.0  # the largest share of a proxy's CPU that went to something else

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  ! {text}", file=sys.stderr, flush=True)

    def loop(self, target: Target, seconds: int) -> load.Loop:
        return load.closed_loop(
            target.address,
            connections=self.plan.loop_connections,
            seconds=seconds,
            wrk=self.wrk,
            script=self.wrk_script,
        )


class Rounds:
    """Figures of several rounds, taken in turns (A B, A B, …), since machines have moods."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[str, list[float]]] = {}

    def add(self, figure: str, target: Target, value: float) -> None:
        self._samples.setdefault(figure, {}).setdefault(target.name, []).append(value)

    def medians(self) -> dict[str, Figures]:
        return {
            figure: {name: statistics.median(values) for name, values in by_target.items()}
            for figure, by_target in self._samples.items()
        }


def _settle(target: Target) -> None:
    """Wait until the target's processes rest: what started has started, what was recorded late is recorded."""
    if target.pid is None:
        return
    for _ in range(SETTLED_TRIES):
        before_s = cpu_s(target.pid)
        time.sleep(SETTLE_S)
        if cpu_s(target.pid) - before_s < SETTLED_AT * SETTLE_S:
            return


def _in_turns(bench: Bench, targets: Sequence[Target], act: Callable[[Target], None], what: str) -> None:
    """Do act with each target, round by round; a target that fails is noted and left out from then on.

    The upstream by itself takes part in the first round only: a ceiling need not be exact.
    """
    done: set[str] = set()
    for _ in range(bench.plan.rounds):
        for target in targets:
            if target.name in done:
                continue
            try:
                act(target)
                _settle(target)  # or the next one's figures would be disturbed by it
            except (LoadError, OSError) as exc:
                done.add(target.name)
                bench.note(f"{what}, {target.name}: {exc}")
            if target.pid is None:
                done.add(target.name)


class Meter:
    """The CPU that a target's process tree spends from here on; nothing for the upstream by itself."""

    def __init__(self, bench: Bench, target: Target) -> None:
        self._bench, self._target = bench, target
        self._before_s = self._cpu_s()
        self._busy_before_s = busy_s(bench.proxy_cpu)
        self._began_s = time.monotonic()

    def _cpu_s(self) -> float:
        return 0.0 if self._target.pid is None else cpu_s(self._target.pid)

    def read(self) -> float:
        """Return the CPU seconds so far."""
        spent_s = self._cpu_s() - self._before_s
        foreign_s = busy_s(self._bench.proxy_cpu) - self._busy_before_s - spent_s
        foreign = foreign_s / (time.monotonic() - self._began_s)
        self._bench.foreign_most = max(self._bench.foreign_most, foreign)
        return spent_s


def _load_cpu_s(bench: Bench) -> float:
    """Return the seconds that the load and the upstream have spent, which share a CPU."""
    return time.process_time() + cpu_s(bench.upstream.pid)


def requests(bench: Bench, targets: Sequence[Target]) -> dict[str, Figures]:
    """CPU µs per request, and requests per second, of a closed loop.

    The CPU is counted until the target rests again: what a gateway puts off, its accounting, is a request's cost too.
    """
    rounds = Rounds()

    def one(target: Target) -> None:
        meter = Meter(bench, target)
        loop = bench.loop(target, bench.plan.loop_s)
        _settle(target)
        spent_s = meter.read()
        if target.pid is not None:
            rounds.add("cpu_us_per_request", target, spent_s / loop.requests * 1e6)
        rounds.add("requests_per_s", target, loop.requests / loop.seconds)

    for target in targets:
        if target.pid is not None:
            bench.loop(target, 1)  # warm-up
            _settle(target)
    _in_turns(bench, targets, one, "requests")
    return rounds.medians()


@dataclass(frozen=True, slots=True)
class Held:
    """What a window of time over open streams showed."""

    events: int
    expected: float
    cut: int
    seconds: float
    cpu_s: float
    load_cpu_s: float
    lateness_p99_ms: float

    @property
    def load_percent(self) -> float:
        """How busy the CPU of load and upstream was; near 100 the load is the limit, not the proxy."""
        return 100 * self.load_cpu_s / self.seconds

    @property
    def in_time(self) -> bool:
        # What is late by the bar at the window's end may be missing from it.
        arrived_at_least = ARRIVED_AT_LEAST - LATENESS_BAR_MS / 1000 / self.seconds
        return (
            self.events >= self.expected * arrived_at_least and not self.cut and self.lateness_p99_ms < LATENESS_BAR_MS
        )

    def __str__(self) -> str:
        return (
            f"p99 lateness {self.lateness_p99_ms:.0f} ms, {self.events} of {self.expected:.0f} events, "
            f"{self.cut} streams cut; CPU of load and upstream at {self.load_percent:.0f}%"
        )


def hold(bench: Bench, target: Target, *, streams: int, seconds: float) -> Held:
    """Open the streams at STREAM_RATE_PER_S, let them settle, and look at one window of time.

    Opening and closing lie outside the window: they are requests, and TLS handshakes.
    """

    async def look() -> Held:
        async with load.open_streams(target.address, streams=streams, rate_per_s=STREAM_RATE_PER_S) as window:
            with load.no_collections():
                await load.start_streams(bench.upstream.plain)
                await asyncio.sleep(SETTLE_S)
                meter = Meter(bench, target)
                load_before_s = _load_cpu_s(bench)
                began_s = time.monotonic()
                window.recording = True
                await asyncio.sleep(seconds)
                window.recording = False
                took_s = time.monotonic() - began_s
                load_spent_s = _load_cpu_s(bench) - load_before_s
                spent_s = meter.read()
            late_us = window.lateness_us
            return Held(
                events=len(late_us),
                expected=streams * STREAM_RATE_PER_S * took_s,
                cut=window.cut,
                seconds=took_s,
                cpu_s=spent_s,
                load_cpu_s=load_spent_s,
                lateness_p99_ms=percentile(late_us, 99) / 1000 if late_us else float("inf"),
            )

    try:
        return uvloop.run(look())
    finally:
        uvloop.run(load.wait_until_quiet(bench.upstream.plain))


def chunks(bench: Bench, targets: Sequence[Target]) -> dict[str, Figures]:
    """CPU µs per event passed on, of many streams at a moderate rate."""
    plan, rounds = bench.plan, Rounds()

    def one(target: Target) -> None:
        seconds = plan.chunk_events / STREAM_RATE_PER_S
        held = hold(bench, target, streams=plan.chunk_streams, seconds=seconds)
        if held.cut or held.events < held.expected * ARRIVED_AT_LEAST:
            raise LoadError(str(held))
        rounds.add("cpu_us_per_chunk", target, held.cpu_s / held.events * 1e6)

    _in_turns(bench, [target for target in targets if target.pid is not None], one, "chunks")
    return rounds.medians()


def latency(bench: Bench, targets: Sequence[Target]) -> dict[str, Figures]:
    """Milliseconds from when a request was due to its answer's last byte, at a fixed rate; rounds pooled."""
    plan = bench.plan
    samples_ms: dict[str, list[float]] = {}

    def one(target: Target) -> None:
        with load.no_collections():
            found = uvloop.run(
                load.open_loop(target.address, rate_per_s=plan.latency_rate_per_s, seconds=plan.latency_s)
            )
        samples_ms.setdefault(target.name, []).extend(found)

    _in_turns(bench, targets, one, "latency")
    return {
        f"latency_p{rank}_ms": {name: percentile(values, rank) for name, values in samples_ms.items()}
        for rank in (50, 99)
    }


def streams(bench: Bench, targets: Sequence[Target]) -> dict[str, Figures]:
    """The most open streams whose events came in time, by a search upward that stops at the first failure."""
    figures: dict[str, Figures] = {
        "streams_held": {},
        "streams_lateness_p99_ms": {},
        "streams_cpu_percent": {},
        "streams_load_percent": {},
    }

    def holds(target: Target, level: int) -> bool:
        try:
            held = hold(bench, target, streams=level, seconds=bench.plan.held_s)
        except (LoadError, OSError) as exc:
            bench.note(f"{level} streams, {target.name}: {exc}")
            return False
        _settle(target)
        if not held.in_time:
            bench.note(f"{level} streams, {target.name}: {held}")
            return False
        figures["streams_held"][target.name] = level
        figures["streams_lateness_p99_ms"][target.name] = held.lateness_p99_ms
        figures["streams_load_percent"][target.name] = held.load_percent
        if target.pid is not None:
            figures["streams_cpu_percent"][target.name] = 100 * held.cpu_s / held.seconds
        return True

    for target in targets:
        figures["streams_held"][target.name] = 0
        lowest, *higher = bench.plan.held_levels
        if not any(holds(target, level) for level in (lowest, lowest, lowest // 2, lowest // 4)):
            continue
        if figures["streams_held"][target.name] == lowest:
            for level in higher:
                if not any(holds(target, level) for _ in range(bench.plan.held_tries)):
                    break
    return figures


def memory(bench: Bench, name: str, start: Start) -> dict[str, Figures]:
    """Bytes of a fresh process tree: idle after a few requests, and added by each open silent stream."""
    count = bench.plan.idle_streams

    async def held_bytes(target: Target, pid: int) -> int:
        async with load.open_streams(target.address, streams=count, rate_per_s=0):
            await asyncio.sleep(SETTLE_S)
            return memory_of(pid).pss_bytes

    with start(name) as target:
        pid = target.pid
        assert pid is not None
        bench.loop(target, 1)
        _settle(target)
        idle = memory_of(pid)
        held = uvloop.run(held_bytes(target, pid))
    return {
        "memory_idle_pss_bytes": {name: idle.pss_bytes},
        "memory_idle_rss_bytes": {name: idle.rss_bytes},
        "memory_per_stream_bytes": {name: (held - idle.pss_bytes) / count},
    }


def bulk(bench: Bench, name: str, start: Start) -> dict[str, Figures]:
    """Seconds and CPU seconds for one large body each way, and by how many bytes it raised the tree's RSS.

    The peak is the first round's, in a fresh process; later rounds find its memory already there.
    """
    rounds = Rounds()
    peaks: dict[str, Figures] = {}

    def one(target: Target) -> None:
        for way, act in (("upload", load.upload), ("download", load.download)):
            rss_before = reset_peaks(target.pid) if target.pid else 0
            meter = Meter(bench, target)
            rounds.add(f"{way}_s", target, act(target.address, bench.plan.bulk_bytes))
            if target.pid:
                rounds.add(f"{way}_cpu_s", target, meter.read())
                peaks.setdefault(f"{way}_peak_bytes", {name: peak_rss(target.pid) - rss_before})

    with start(name) as target:
        bench.loop(target, 1)
        _settle(target)  # what records the loop's requests is no part of a body's peak
        _in_turns(bench, [target], one, "bulk")
    return rounds.medians() | peaks


def percentile(values: Sequence[float], rank: int) -> float:
    """Return the value that rank percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * rank // 100) - 1)]
