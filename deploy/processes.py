"""One container's processes, without the container: started, asked for its health, paused, killed, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEALTH_PATIENCE_S = 30.0
_TICK_S = 0.05


class StartError(Exception):
    """A process did not become healthy, or ended at once; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `user` is the system user to run as, where the caller is root and the program refuses to be."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    log_path: Path
    health: Sequence[str] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    stop_grace_s: float = 10.0
    user: str | None = None


class Managed:
    """One process and its children. `is_wanted` says whether a supervisor should start it anew when it has ended."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_wanted = False
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def pid(self) -> int:
        """The id of the process that runs, or ran last."""
        if self._process is None:
            raise StartError(f"{self.name} was never started")
        return self._process.pid

    @property
    def log(self) -> str:
        path = self.plan.log_path
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        plan = self.plan
        with plan.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                list(plan.argv),
                cwd=plan.directory,
                env=dict(plan.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=plan.user,
                group=plan.user,
                extra_groups=None if plan.user is None else [],
            )
        self.starts += 1
        self.is_wanted = True

    def is_healthy(self) -> bool:
        """Run the health check's command once; without one, a process that runs is healthy."""
        if not self.is_running:
            return False
        if not self.plan.health:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                list(self.plan.health),
                cwd=self.plan.directory,
                env=dict(self.plan.environment),
                capture_output=True,
                timeout=HEALTH_PATIENCE_S,
            )
            return done.returncode == 0
        return False

    def wait_healthy(self, timeout_s: float) -> None:
        """Return once the health check succeeds. StartError if it does not in time, or the process ends."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            if not self.is_running or time.monotonic() > deadline:
                raise StartError(f"{self.name} is not healthy:\n{self.log[-3000:]}")
            time.sleep(_TICK_S)

    def run_to_end(self, timeout_s: float) -> None:
        """Start it and return once it has ended well; StartError otherwise."""
        self.start()
        self.is_wanted = False
        try:
            status = self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            status = None
        if status != 0:
            raise StartError(f"{self.name} failed:\n{self.log[-3000:]}")

    def wait(self, timeout_s: float) -> int:
        """Return the exit status once it has ended; subprocess.TimeoutExpired if it does not in time."""
        if self._process is None:
            raise StartError(f"{self.name} was never started")
        return self._process.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the first process, as an engine does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def stop(self) -> int | None:
        """Stop it as an engine does: its signal, its grace period, then SIGKILL. Returns the exit status."""
        self.is_wanted = False
        if self._process is None:
            return None
        self.resume()
        self.send(self.plan.stop_signal)
        try:
            return self._process.wait(self.plan.stop_grace_s)
        except subprocess.TimeoutExpired:
            self._signal_all(signal.SIGKILL)
            return self._process.wait(10)

    def kill(self) -> None:
        """Kill all of it at once, as a machine's end would; a supervisor starts it anew."""
        self._signal_all(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)

    def pause(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        if not self.is_running:
            return
        for pid in family(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def family(pid: int) -> list[int]:
    """Return the process and all its descendants, parents first."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # gone since it was listed
            for child in path.read_text().split():
                found += family(int(child))
    return found
