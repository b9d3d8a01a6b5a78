"""A clock of a topology's own, which jumps while its programs run: see `clock.c`."""

from __future__ import annotations

import datetime as dt
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


def can_shift() -> bool:
    """Return whether this machine has a compiler for it."""
    return shutil.which("cc") is not None


class ShiftedClock:
    """`with ShiftedClock() as clock:` gives `clock.environment` to programs, whose time is then set by `clock.set`."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="proxysite-clock-"))
        self._directory.chmod(0o755)  # the database is another user's
        self._offset = self._directory / "offset"
        self._library = self._directory / "clock.so"
        self.environment = {"LD_PRELOAD": str(self._library), "SHIFTED_CLOCK": str(self._offset)}
        self._offset_s = 0

    def __enter__(self) -> ShiftedClock:
        self._offset.write_bytes(struct.pack("q", 0))
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE), "-ldl"],
            check=True,
            capture_output=True,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def set(self, offset_s: int) -> None:
        """Have it from now on so many seconds before the machine's, or behind it if negative."""
        self._offset_s = offset_s
        with self._offset.open("r+b") as file:  # in place: the programs have it mapped
            file.write(struct.pack("q", offset_s))

    def now(self) -> dt.datetime:
        return dt.datetime.fromtimestamp(time.time() + self._offset_s, dt.UTC)
