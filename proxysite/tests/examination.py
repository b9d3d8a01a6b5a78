"""Runs `manage.py doctor` on a proxy under test, and reads what it says."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from email.utils import format_datetime

from gateway.tests.fake_upstream import Exchange
from gateway.tests.live import ROOT, LiveProxy

Report = dict[str, list[tuple[str, str, str]]]


async def refuse(exchange: Exchange) -> None:
    """Answer as OpenAI answers a question without a key."""
    date = format_datetime(dt.datetime.now(dt.UTC), usegmt=True)
    await exchange.answer(b'{"error": {}}', status="401 Unauthorized", headers=(("date", date),))


def run(proxy: LiveProxy, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", "doctor", *arguments],
        cwd=ROOT,
        env=proxy.environment | environment,
        capture_output=True,
        text=True,
        timeout=240,
        input=stdin,
    )


def examine(proxy: LiveProxy, *arguments: str, code: int, **environment: str) -> Report:
    """Return level, finding and cure of each part; the exit code must be `code`."""
    done = run(proxy, "--json", *arguments, **environment)
    assert done.returncode == code, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["status"] == ("ok", "warning", "error")[code]
    report: Report = {}
    for found in answer["findings"]:
        report.setdefault(found["part"], []).append((found["level"], found["finding"], found["cure"]))
        assert bool(found["cure"]) == (found["level"] != "ok"), found
    return report


def trouble(report: Report) -> dict[str, str]:
    """Return the parts that are not well, each with its worst level."""
    bad = {part: [level for level, _, _ in found if level != "ok"] for part, found in report.items()}
    return {part: max(levels, key=["warning", "error"].index) for part, levels in bad.items() if levels}


def said(report: Report, part: str) -> str:
    return " ".join(f"{finding} {cure}" for _, finding, cure in report[part])
