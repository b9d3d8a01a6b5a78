"""Disks that are full when a test says so."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from pathlib import Path

from gateway.tests.journals import journal_files


class FullByLimit:
    """A limit of this process's file sizes: every write beyond fails, part of one succeeds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, but_bytes: int = 0) -> None:
        sizes = [path.stat().st_size for path in journal_files(self.directory)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes, default=0) + but_bytes, self._before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


class FullDisk:
    """A file system of 64 KiB and a file that takes what is left of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, but_bytes: int = 0) -> None:
        with contextlib.suppress(OSError), (self.directory / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(b"x" * 4096)

    def free(self) -> None:
        (self.directory / "ballast").unlink(missing_ok=True)


def mount_tmpfs(directory: Path, *, size: str) -> bool:
    """Return whether a file system of that size was mounted: not everybody may."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


Disk = FullByLimit | FullDisk
