"""The bars, the table and the JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.measure import Figures, Plan
from bench.proxies import DIRECT, RELAY, ROOT, find_tool

Results = dict[str, dict[str, Figures]]  # upstream kind → figure → target → value

NOT_A_RATIO = {
    # taken at the level each one held
    "streams_lateness_p99_ms",
    "streams_cpu_percent",
    "streams_load_percent",
    # next to nothing at nginx
    "upload_peak_bytes",
    "download_peak_bytes",
}
CEILING = (
    '"no proxy" is the load against the fake upstream itself: no proxy can show more than the load can ask for. '
    "Before a TLS upstream the load does TLS there as well, which it is spared with a proxy between."
)
HEADINGS = {
    DIRECT: "no proxy",
    "nginx": "nginx",
    "own": "gateway, own transport",
    RELAY: "without accounting",
    "httpx": "gateway, httpx",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """What the gateway with its own transport is held to, or its relay; one of the three limits is set."""

    figure: str
    upstream: str
    proxy: str = "own"
    times_nginx: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    def met(self, figures: Figures) -> bool | None:
        """Tell whether the proxy reaches the bar; None when it, or nginx where that counts, was not measured."""
        value, nginx = figures.get(self.proxy), figures.get("nginx")
        if value is None:
            return None
        if self.times_nginx is not None:
            return None if not nginx else value <= self.times_nginx * nginx
        if self.at_most is not None:
            return value <= self.at_most
        return value >= (self.at_least or 0)

    def text(self, unit: Callable[[float], str]) -> str:
        if self.times_nginx is not None:
            return f"≤ {self.times_nginx:g} ×"
        if self.at_most is not None:
            return f"≤ {unit(self.at_most)}"
        return f"≥ {unit(self.at_least or 0)}"


BARS = [
    # With accounting on, the database included.
    Bar("cpu_us_per_request", "http", times_nginx=8.5),
    Bar("cpu_us_per_request", "tls", times_nginx=9.5),
    Bar("cpu_us_per_chunk", "http", times_nginx=2.6),
    Bar("cpu_us_per_chunk", "tls", times_nginx=3.4),
    Bar("cpu_us_per_request", "http", RELAY, times_nginx=7),
    Bar("cpu_us_per_request", "tls", RELAY, times_nginx=8),
    Bar("cpu_us_per_chunk", "http", RELAY, times_nginx=2.2),
    Bar("cpu_us_per_chunk", "tls", RELAY, times_nginx=3),
    Bar("latency_p50_ms", "http", times_nginx=2),
    Bar("latency_p50_ms", "tls", times_nginx=2),
    Bar("streams_held", "http", at_least=2000),
    Bar("streams_held", "tls", at_least=1500),
    Bar("memory_per_stream_bytes", "http", at_most=60_000),
    Bar("memory_per_stream_bytes", "tls", at_most=90_000),
    # Bounded memory whatever the size of a body: the relay's promise, not the transport's speed.
    Bar("upload_peak_bytes", "http", at_most=20_000_000),
    Bar("upload_peak_bytes", "tls", at_most=20_000_000),
    Bar("download_peak_bytes", "http", at_most=20_000_000),
    Bar("download_peak_bytes", "tls", at_most=20_000_000),
    Bar("conversations_slowest_s", "http", at_most=6),
    Bar("conversations_slowest_s", "tls", at_most=6),
    Bar("conversations_lateness_p99_ms", "http", at_most=250),
    Bar("conversations_lateness_p99_ms", "tls", at_most=250),
]


def _plain(value: float) -> str:
    return f"{value:,.0f}"


def _micro(value: float) -> str:
    return f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}"


def _kilobytes(value: float) -> str:
    return f"{value / 1000:.1f} KB"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def rows(plan: Plan) -> list[tuple[str, str, Callable[[float], str]]]:
    """Return (figure, what it is, how to write it) in the table's order."""
    size = f"{plan.bulk_bytes / 1e6:g} MB"
    return [
        ("cpu_us_per_request", "CPU per request, µs", _micro),
        ("requests_per_s", "requests/s", _plain),
        ("cpu_us_per_chunk", "CPU per SSE chunk, µs", _micro),
        ("latency_p50_ms", f"latency at {plan.latency_rate_per_s} requests/s, p50, ms", _seconds),
        ("latency_p99_ms", "the same, p99, ms", _seconds),
        ("streams_held", "streams held at 20 events/s", _plain),
        ("streams_lateness_p99_ms", "their p99 lateness, ms", _plain),
        ("streams_cpu_percent", "their CPU, % of one", _plain),
        ("streams_load_percent", "CPU of load and upstream then, %", _plain),
        ("memory_idle_pss_bytes", "memory idle (PSS)", _megabytes),
        ("memory_idle_rss_bytes", "memory idle (RSS)", _megabytes),
        ("memory_per_stream_bytes", "memory per held stream (PSS)", _kilobytes),
        ("upload_s", f"{size} up, s", _seconds),
        ("upload_cpu_s", f"{size} up, CPU s", _seconds),
        ("upload_peak_bytes", f"{size} up, peak RSS added", _megabytes),
        ("download_s", f"{size} down, s", _seconds),
        ("download_cpu_s", f"{size} down, CPU s", _seconds),
        ("download_peak_bytes", f"{size} down, peak RSS added", _megabytes),
        (
            "conversations_first_s",
            f"{plan.conversations} conversations at once, 5 s upstream: first answer, s",
            _seconds,
        ),
        ("conversations_slowest_s", "the last answer, s", _seconds),
        ("conversations_lateness_p99_ms", f"p99 lateness of {plan.conversation_streams} streams meanwhile, ms", _plain),
        ("conversations_lateness_max_ms", "their worst, ms", _plain),
        ("conversations_cpu_ms", "CPU per message of a conversation, streams included, ms", _seconds),
    ]


def bars_for(figure: str, upstream: str) -> list[Bar]:
    return [bar for bar in BARS if (bar.figure, bar.upstream) == (figure, upstream)]


def missed(results: Results, names: Sequence[str]) -> list[Bar]:
    """Return the bars not reached, among what was measured; a gateway that failed altogether reaches none."""
    found = []
    for bar in BARS:
        figures = results.get(bar.upstream, {}).get(bar.figure)
        if figures is None or bar.proxy not in names:
            continue
        if figures.get(bar.proxy) is None or bar.met(figures) is False:
            found.append(bar)
    return found


def table(results: Results, upstream: str, names: Sequence[str], plan: Plan) -> str:
    """Return the Markdown table for one kind of upstream."""
    gateways = [name for name in names if name != "nginx"]
    heads = ["", HEADINGS[DIRECT], *(HEADINGS.get(name, name) for name in names)]
    heads += [f"{name} ÷ nginx" for name in gateways if "nginx" in names]
    heads.append("bar")
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 2) + "|---|"]
    for figure, label, unit in rows(plan):
        figures = results[upstream].get(figure)
        if not figures:
            continue
        cells = [label, *(_cell(figures.get(name), unit) for name in (DIRECT, *names))]
        nginx = figures.get("nginx")
        if "nginx" in names:
            comparable = figure not in NOT_A_RATIO
            cells += [_ratio(figures.get(name), nginx) if comparable else "" for name in gateways]
        bars = [bar for bar in bars_for(figure, upstream) if bar.proxy in names]
        cells.append("; ".join(_bar_cell(bar, figures, unit) for bar in bars))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, unit: Callable[[float], str]) -> str:
    return "" if value is None else unit(value)


def _ratio(value: float | None, nginx: float | None) -> str:
    return f"{value / nginx:.2f}" if value is not None and nginx and nginx > 0 else ""


def _bar_cell(bar: Bar, figures: Figures, unit: Callable[[float], str]) -> str:
    text = bar.text(unit) + {True: " ✓", False: " ✗", None: ""}[bar.met(figures)]
    return text if bar.proxy == "own" else f"{bar.proxy} {text}"


def machine() -> dict[str, str]:
    """Return what the figures depend on besides the code."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.machine(),
        "cpus": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _first_line([find_tool("nginx") or "nginx", "-v"]),
        "wrk": _first_line([find_tool("wrk") or "wrk", "-v"]),
        "commit": _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "load_average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_line(argv: list[str]) -> str:
    try:
        run = subprocess.run(argv, capture_output=True, text=True, timeout=10)
    except OSError:
        return ""
    lines = (run.stdout + run.stderr).splitlines()
    return lines[0] if lines else ""


def write_json(
    path: Path,
    results: Results,
    names: Sequence[str],
    plan: Plan,
    about: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write everything there is; each figure has its unit in its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "machine": dict(about),
            "plan": asdict(plan),
            "results": results,
            "bars": [asdict(bar) for bar in BARS],
            "missed": [asdict(bar) for bar in missed(results, names)],
            "notes": list(notes),
        },
        indent=2,
    )
    path.write_text(text + "\n")
