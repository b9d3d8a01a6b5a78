"""`python -m bench.chaos`: break one part of the topology after the other under load, and see that the rest goes on.

Exit status 1 when a stream broke that did not touch the broken part, when something did not recover by itself, or when
the ledger afterwards lacks an answer that a client saw complete, or has one twice. All limits are set, far above what
is asked for, so that none may refuse anybody. A full disk needs root, a clock that jumps a compiler (`cc`): where there
is none, the attack is left out, and said to be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx2 as httpx
import psycopg

from bench.clock import ShiftedClock, can_shift
from bench.crowd import STREAM, WHOLE, Crowd, ledger_faults
from bench.faulty_upstream import FaultyUpstream
from deploy import programs
from deploy.topology import Topology

CLIENTS = 24
EVENTS, INTERVAL_S = 25, 0.1
WARM_UP_S = 5.0
RECOVERED_WITHIN_S = 30.0
LAST_FAILURE_WITHIN_S = 3.0
MET_WITHIN_S = 60.0
JOURNAL_BYTES = 4 * 1024 * 1024
JUMP_S = 3600
SETTINGS = {
    "HEARTBEAT_SECONDS": "1",
    "KEY_REQUESTS_PER_MINUTE": "1000000",
    "KEY_TOKENS_PER_MINUTE": "10000000000",
    "KEY_CONCURRENT_STREAMS": "1000",
    "KEY_MONTHLY_USD": "1000000",
}


@dataclass(frozen=True, slots=True)
class Attack:
    """What is broken. `may_fail` says of a failure, by the gateway that it came through, whether it is of that."""

    name: str
    strike: Callable[[], None]
    may_fail: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    attack: str
    complete: int
    failed: int
    wrong: tuple[str, ...]
    recovered_after_s: float

    def __str__(self) -> str:
        fate = "ok" if not self.wrong else "; ".join(self.wrong)
        return f"{self.attack:30} {self.complete:6} {self.failed:6} {self.recovered_after_s:8.1f}  {fate}"


@dataclass(frozen=True, slots=True)
class Target:
    """What is attacked. `clock` is that of all its programs, where it can be set."""

    topology: Topology
    upstream: FaultyUpstream
    clock: ShiftedClock | None
    has_small_disk: bool

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) if self.clock is None else self.clock.now()


def attacks(target: Target, *, pause_s: float, down_s: float) -> list[Attack]:
    topology, upstream = target.topology, target.upstream
    gateway = topology.one("gateway")
    found = [
        Attack("gateway killed", gateway.kill, lambda through: through in ("", "g0")),
        Attack("worker killed", topology.one("worker").kill, _nobody),
        Attack("redis restarted", lambda: _restart(topology, "redis"), _nobody),
        Attack("postgres restarted", lambda: _restart(topology, "postgres"), _nobody),
    ]
    for name in ("gateway", "worker", "redis", "postgres"):
        found.append(Attack(f"{name} paused for {pause_s:g} s", _pause(topology, name, pause_s), _nobody))

    if target.has_small_disk:
        found.append(Attack(f"journal's disk full for {pause_s:g} s", lambda: _fill_disk(topology, pause_s), _nobody))
    if (clock := target.clock) is not None:
        found.append(Attack(f"clock set {JUMP_S} s forward", lambda: clock.set(JUMP_S), _nobody))
        found.append(Attack(f"clock set {JUMP_S} s back", lambda: clock.set(0), _nobody))

    def take_upstream_away() -> None:
        upstream.go_away()
        time.sleep(down_s)
        upstream.come_back()

    found.append(Attack(f"upstream away for {down_s:g} s", take_upstream_away, lambda through: True))
    return found


def _nobody(through: str) -> bool:
    return False


def _restart(topology: Topology, name: str) -> None:
    member = topology.one(name)
    member.stop()
    member.start()
    member.wait_healthy(60)


def _pause(topology: Topology, name: str, pause_s: float) -> Callable[[], None]:
    def strike() -> None:
        member = topology.one(name)
        member.pause()
        try:
            time.sleep(pause_s)
        finally:
            member.resume()

    return strike


def _fill_disk(topology: Topology, full_s: float) -> None:
    """Leave no byte on the journal's disk, whatever the gateways give back meanwhile, until each has met that."""
    rubbish = topology.journal / "rubbish"
    full_until = time.monotonic() + full_s
    met_until = full_until + MET_WITHIN_S
    with rubbish.open("ab", buffering=0) as file:
        while time.monotonic() < full_until or not _have_met_full_disk(topology):
            if time.monotonic() > met_until:
                raise RuntimeError("a gateway has not noticed that the disk was full")
            for size in (65536, 4096):
                with contextlib.suppress(OSError):
                    while file.write(os.urandom(size)) == size:
                        pass
            time.sleep(0.002)
    rubbish.unlink()


def _have_met_full_disk(topology: Topology) -> bool:
    return all("No space left on device" in member.log for member in topology.services["gateway"])


def suffer(target: Target, crowd: Crowd, attack: Attack) -> Outcome:
    """Strike once, and look at what the clients saw until all is well again."""
    begun_before = len(crowd.seen)
    attack.strike()
    struck_at = time.monotonic()
    is_recovered = _wait_until_recovered(target, crowd, struck_at)
    recovered_after_s = time.monotonic() - struck_at
    seen = crowd.seen[begun_before:]
    failed = [one for one in seen if one.failure]
    wrong = [f"{one.gateway or '-'}: {one.failure}" for one in failed if not attack.may_fail(one.gateway)]
    late = [
        one for one in failed if one.started_at > struck_at + LAST_FAILURE_WITHIN_S and attack.may_fail(one.gateway)
    ]
    summary = [f"{len(wrong)} failed that did not touch it, such as {wrong[0]}"] if wrong else []
    if late:
        summary.append(f"{len(late)} failed long after it, such as {late[0].failure}")
    if not is_recovered:
        summary.append("did not recover")
    complete = sum(one.is_complete for one in seen)
    return Outcome(attack.name, complete, len(failed), tuple(summary), recovered_after_s)


def _wait_until_recovered(target: Target, crowd: Crowd, struck_at: float) -> bool:
    """Return whether in time all parts were healthy again, and all requests begun after the blow went well."""
    deadline = struck_at + RECOVERED_WITHIN_S
    topology, since = target.topology, target.now()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        recent = crowd.since(max(struck_at, time.monotonic() - 5))
        gateways = {one.gateway for one in recent if one.is_complete}
        if (
            len(gateways) == 2
            and not any(one.failure for one in recent)
            and _is_ready(topology)
            and _beats(topology, since, target.now())
        ):
            return True
    return False


def _is_ready(topology: Topology) -> bool:
    for member in [*topology.services["gateway"], *topology.services["web"]]:
        try:
            answer = httpx.get(f"http://127.0.0.1:{member.plan.environment['PORT']}/readyz", timeout=5)
        except httpx.HTTPError:
            return False
        if answer.status_code != 200:
            return False
    return True


def _beats(topology: Topology, since: dt.datetime, now: dt.datetime) -> bool:
    """Return whether the heart, which takes beat, Redis, worker and database, has beaten between the two."""
    statement = (
        "SELECT count(*) FROM proxysite_taskrun WHERE task = 'proxysite.tasks.heartbeat' "
        "AND last_started_at BETWEEN %(since)s AND %(now)s AND last_succeeded_at BETWEEN %(since)s AND %(now)s"
    )
    try:
        with psycopg.connect(topology.database_url(), connect_timeout=5) as connection:
            row = connection.execute(statement, {"since": since, "now": now}).fetchone()
    except psycopg.Error:
        return False
    return bool(row and row[0])


def rage(*, pause_s: float, down_s: float, only: str = "") -> tuple[list[Outcome], list[str]]:
    """Go through all attacks; return what each did, and what the ledger has wrong in the end."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(FaultyUpstream(events=EVENTS, interval_s=INTERVAL_S))
        clock = stack.enter_context(ShiftedClock()) if can_shift() else None
        has_small_disk = programs.can_mount()
        topology = stack.enter_context(
            Topology(
                SETTINGS,
                gateways=[{"UPSTREAM_URL": f"{upstream.url}/g{number}"} for number in range(2)],
                everywhere=clock.environment if clock else None,
                journal_bytes=JOURNAL_BYTES if has_small_disk else 0,
            )
        )
        target = Target(topology, upstream, clock, has_small_disk)
        outcomes = []
        with Crowd(topology, kinds=[STREAM, STREAM, STREAM, WHOLE], clients=CLIENTS) as crowd:
            time.sleep(WARM_UP_S)
            for attack in attacks(target, pause_s=pause_s, down_s=down_s):
                if only in attack.name:
                    outcomes.append(suffer(target, crowd, attack))
                    print(outcomes[-1], flush=True)
        return outcomes, ledger_faults(topology, crowd)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pause", type=float, default=10.0, help="seconds for which parts are paused")
    parser.add_argument("--down", type=float, default=30.0, help="seconds for which the upstream is away")
    parser.add_argument("--only", default="", help="attacks with this in their name")
    options = parser.parse_args()
    if not programs.can_mount():
        print("left out: the journal's disk full (needs root)")
    if not can_shift():
        print("left out: the clock set (needs cc)")
    print(f"{'attack':30} {'whole':>6} {'failed':>6} {'well, s':>8}")
    outcomes, faults = rage(pause_s=options.pause, down_s=options.down, only=options.only)
    print("ledger: " + ("; ".join(faults) or "every complete answer exactly once"))
    return 1 if faults or any(outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
