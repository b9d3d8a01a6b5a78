"""`python -m bench`: measure the gateway and nginx side by side, print a table, write the figures as JSON."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from bench import load, measure, report
from bench.conversations import conversations
from bench.measure import DISTURBED_AT, FULL, QUICK, Bench
from bench.processes import ProcessError
from bench.proxies import DIRECT, LAUNCHERS, RELAY, Target, fake_upstream, find_tool, proxy

MEASUREMENTS = ("requests", "chunks", "latency", "streams", "memory", "bulk", "conversations")
UPSTREAMS = ("http", "tls")
OPEN_FILES = 20_000
SIDE_BY_SIDE = {
    "requests": measure.requests,
    "chunks": measure.chunks,
    "latency": measure.latency,
    "streams": measure.streams,
}
# What the relay by itself has bars for.
COSTS = ("requests", "chunks", "latency")
ONE_AT_A_TIME = {"memory": measure.memory, "bulk": measure.bulk, "conversations": conversations}


def main() -> int:
    options = parse_options()
    if missing := [tool for tool in ("nginx", "wrk") if find_tool(tool) is None]:
        print(f"bench needs {' and '.join(missing)}: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        print("bench needs two CPUs: one for the proxy, one for the load and the upstream", file=sys.stderr)
        return 2
    proxy_cpu, load_cpu = cpus[:2]
    os.sched_setaffinity(0, {load_cpu})
    raise_open_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: leave through every `finally`
    about = report.machine()
    results: report.Results = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as temp, ExitStack() as stack:
        work_dir = Path(temp)
        script = work_dir / "post.lua"
        script.write_text(load.WRK_SCRIPT % load.CHAT_BODY)
        upstream = stack.enter_context(fake_upstream(work_dir, cpu=load_cpu))
        bench = Bench(QUICK if options.quick else FULL, find_tool("wrk") or "", script, upstream, proxy_cpu=proxy_cpu)
        try:
            for kind in options.upstream:
                results[kind] = {}
                run_kind(bench, kind, options, results[kind], work_dir=work_dir, cpu=proxy_cpu)
        except ProcessError as exc:
            print(exc, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    if bench.foreign_most > DISTURBED_AT:
        bench.notes.append(
            f"disturbed: something else had up to {bench.foreign_most:.0%} of the proxies' CPU; "
            "take the figures on a quiet machine"
        )
    print_report(bench, results, options, about)
    return 1 if options.check and report.missed(results, options.proxies) else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)

    def names(allowed: Sequence[str]) -> dict[str, object]:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(allowed):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not in {', '.join(allowed)}")
            return chosen

        return {"type": parse, "default": list(allowed), "metavar": ",".join(allowed)}

    parser.add_argument("--only", help="these measurements", **names(MEASUREMENTS))
    parser.add_argument("--proxies", help="these proxies", **names(list(LAUNCHERS)))
    parser.add_argument("--upstream", help="these kinds of upstream", **names(UPSTREAMS))
    parser.add_argument("--quick", action="store_true", help="small counts, one round: shows that it works")
    parser.add_argument("--all-streams", action="store_true", help="search the httpx transport's stream limit too")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--json", type=Path, help="where the figures go (default: a new file in bench/out)")
    return parser.parse_args()


def raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run_kind(
    bench: Bench,
    kind: str,
    options: argparse.Namespace,
    results: dict[str, measure.Figures],
    *,
    work_dir: Path,
    cpu: int,
) -> None:
    """Fill results with every figure asked for, before one kind of upstream."""

    def start(name: str) -> AbstractContextManager[Target]:
        return proxy(name, work_dir / name, bench.upstream, kind, cpu=cpu)

    direct = Target(DIRECT, bench.upstream.address(kind), None)
    side_by_side = [name for name in SIDE_BY_SIDE if name in options.only]
    if side_by_side:
        with ExitStack() as stack:
            targets = [direct, *(stack.enter_context(start(name)) for name in options.proxies)]
            for measurement in side_by_side:
                with told(f"{kind}: {measurement}"):
                    left_out = set() if measurement in COSTS else {RELAY}
                    if measurement == "streams" and not options.all_streams:
                        left_out.add("httpx")
                    chosen = [target for target in targets if target.name not in left_out]
                    merge(results, SIDE_BY_SIDE[measurement](bench, chosen))
    for measurement, act in ONE_AT_A_TIME.items():
        if measurement in options.only:
            with told(f"{kind}: {measurement}"):
                for name in [name for name in options.proxies if name != RELAY]:
                    merge(results, act(bench, name, start))


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say on stderr what runs now, and how long it took."""
    print(f"{what} …", file=sys.stderr, flush=True)
    began_s = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)


def merge(results: dict[str, measure.Figures], found: dict[str, measure.Figures]) -> None:
    for figure, by_target in found.items():
        results.setdefault(figure, {}).update(by_target)


def print_report(bench: Bench, results: report.Results, options: argparse.Namespace, about: dict[str, str]) -> None:
    for kind in options.upstream:
        print(f"\n{kind.upper()} upstream\n\n{report.table(results, kind, options.proxies, bench.plan)}")
    print(f"\n{about['cpu']}, Linux {about['kernel']}, Python {about['python']}, {about['nginx']}, {about['taken_at']}")
    print(f"\n{report.CEILING}\n")
    for note in bench.notes:
        print(f"- {note}")
    path = options.json or Path(__file__).parent / "out" / f"{about['taken_at'].replace(':', '')}.json"
    report.write_json(path, results, options.proxies, bench.plan, about, bench.notes)
    print(f"\nFigures: {path}")


if __name__ == "__main__":
    sys.exit(main())
