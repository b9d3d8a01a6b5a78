"""Celery's worker and beat in one process beside the gateway, for an instance without a broker server."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A process that lived for less than this did not really start: the next one waits, twice as long each time.
_SHORT_LIFE_S = 30.0
_LONGEST_WAIT_S = 60.0
# A task in its middle is cut after this; the next run goes on where it was.
_PATIENCE_S = 10.0


class EmbeddedCelery:
    """Celery's process as its parent sees it. Not for several threads; the parent calls `keep_running` often."""

    def __init__(self, *, directory: Path, log: Any) -> None:
        self._directory = directory
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._wait_s = 0.0
        self._is_restarting = False

    def keep_running(self) -> None:
        """Start the process if it does not run, unless the last one ended too recently."""
        now = time.monotonic()
        if self._child is not None:
            if self._child.poll() is None:
                return
            self._note_end(lived_s=now - self._started_at)
        if now >= self._started_at + self._wait_s:
            self._start(now)

    def restart(self) -> None:
        """Ask the process to end; `keep_running` starts the next one, with the code as it is then."""
        if self._child is not None:
            self._is_restarting = True
            self._child.terminate()

    def stop(self) -> None:
        """End the process, and return once it has ended."""
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE_S)
            return
        child.kill()
        child.wait()

    def _start(self, now: float) -> None:
        # A process group of its own: the terminal's Ctrl-C is for the master, which ends this process last.
        self._child = subprocess.Popen(
            [sys.executable, "-m", "proxysite.celery_process"],
            stdin=subprocess.DEVNULL,
            cwd=self._directory,
            process_group=0,
        )
        self._started_at = now
        self._log.info("Celery's worker and beat run in process %s", self._child.pid)

    def _note_end(self, *, lived_s: float) -> None:
        self._child = None
        if self._is_restarting:
            self._is_restarting = False
            self._wait_s = 0.0
            return
        if lived_s >= _SHORT_LIFE_S:
            self._wait_s = 0.0
        else:
            self._wait_s = lived_s + min(max(1.0, 2 * (self._wait_s - lived_s)), _LONGEST_WAIT_S)
        self._log.warning("Celery's process ended by itself and is started anew")
