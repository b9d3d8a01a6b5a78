"""A progress line for commands that count."""

from __future__ import annotations

from typing import Protocol


class Output(Protocol):
    def isatty(self) -> bool: ...
    def flush(self) -> object: ...
    def write(self, text: str, /) -> object: ...


class ProgressLine:
    """Call it with how many more are done; on a terminal it draws a bar, elsewhere it keeps still."""

    def __init__(self, out: Output, *, total: int) -> None:
        self._out = out
        self._total = max(total, 1)
        self._done = 0
        self._is_drawn = out.isatty()

    def __call__(self, more: int) -> None:
        self._done += more
        if self._is_drawn:
            share = min(self._done / self._total, 1.0)
            bar = "#" * int(share * 40)
            self._out.write(f"\r[{bar:<40}] {share:4.0%} {self._done:,}")
            self._out.flush()

    def close(self) -> None:
        if self._is_drawn and self._done:
            self._out.write("\n")
