"""The folder in which Celery's messages are files, where there is no broker server."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

from django.conf import settings

# What waits for longer is of no use: beat has sent the same again, and an operator has clicked again.
_STALE_S = 15 * 60


def make_folders() -> None:
    """Make the folders, which kombu takes for granted."""
    for folder in (settings.CELERY_DIR, *_folders()):
        folder.mkdir(mode=0o700, exist_ok=True)


def take_over() -> None:
    """Make this process the one that takes messages."""
    if _folders():
        # kombu moves each message to the system's folder for temporary files before it reads it: another disk perhaps,
        # and a place that others can read, in which those of a killed process would stay.
        tempfile.tempdir = str(_taken())
        clear_stale()


def clear_stale(*, now: float | None = None) -> int:
    """Remove the messages that nobody took in time, and return how many."""
    oldest = (time.time() if now is None else now) - _STALE_S
    removed = 0
    for path in (path for folder in _folders() for path in folder.glob("*.msg")):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                removed += 1
    return removed


def _folders() -> list[Path]:
    options: dict[str, str] = settings.CELERY_BROKER_TRANSPORT_OPTIONS
    if "data_folder_in" not in options:
        return []
    return [Path(options["data_folder_in"]), Path(options["control_folder"]), _taken()]


def _taken() -> Path:
    return Path(settings.CELERY_DIR / "taken")
