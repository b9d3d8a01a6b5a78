"""What the doctor found, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]

_GRAVITY: dict[Level, int] = {"ok": 0, "warning": 1, "error": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One part, how it is, in a few words, and what to do if it is not well; no secret in any of it."""

    part: str
    level: Level
    finding: str
    cure: str = ""


Check = Callable[[], Iterable[Finding]]


def ok(part: str, finding: str) -> Finding:
    return Finding(part, "ok", finding)


def warning(part: str, finding: str, cure: str) -> Finding:
    return Finding(part, "warning", finding, cure)


def error(part: str, finding: str, cure: str) -> Finding:
    return Finding(part, "error", finding, cure)


def findings_of(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run one check after the other; one that fails is a finding, not an end."""
    for part, check in checks:
        try:
            yield from check()
        except Exception as exc:  # whatever a broken instance raises; by name, since messages may hold addresses
            yield error(part, f"could not be looked at: {type(exc).__name__}", "Look at what the other findings say.")


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 0 if all is well, 1 if there are warnings, 2 if there are errors."""
    return max((_GRAVITY[found.level] for found in findings), default=0)


def as_json(findings: Sequence[Finding]) -> str:
    status = ("ok", "warning", "error")[exit_code(findings)]
    return json.dumps({"status": status, "findings": [asdict(found) for found in findings]}, indent=2)


def as_text(found: Finding) -> str:
    line = f"{found.level:<8} {found.part:<12} {found.finding}"
    cure = "\n".join(f"{'':21} {'→' if number == 0 else ' '} {line}" for number, line in enumerate(_lines(found.cure)))
    return f"{line}\n{cure}" if cure else line


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()
