"""Parts of a CPU for processes: control groups of Linux, version 1 or 2, which root may make."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PERIOD_US = 20_000
_V1, _V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


def can_share() -> bool:
    """Return whether this user may make groups here that bound CPU time."""
    root = _root()
    return root is not None and os.access(root, os.W_OK)


@contextmanager
def share_of_cpu(share: float) -> Iterator[Path]:
    """Make a group whose processes together get at most this share of one CPU; they must have ended at its end."""
    root = _root()
    assert root is not None
    group = root / f"proxysite-bench-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    quota_us = round(_PERIOD_US * share)
    try:
        if root == _V1:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (group / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        yield group
    finally:
        with suppress(OSError):  # what is left of it goes with the machine
            group.rmdir()


def put(group: Path, pids: Iterable[int]) -> None:
    """Put processes into a group; what they start later is in it, too."""
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))


def _root() -> Path | None:
    if (_V1 / "cpu.cfs_quota_us").exists() or (_V1 / "cgroup.procs").exists():
        return _V1
    enabled = _V2 / "cgroup.subtree_control"
    return _V2 if enabled.exists() and "cpu" in enabled.read_text().split() else None
