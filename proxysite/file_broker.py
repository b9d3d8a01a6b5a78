"""The folder in which Celery's messages are files, where there is no broker server."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from pathlib import Path

from django.conf import settings

logger = logging.getLogger("proxysite.file_broker")

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
        clear_cut()


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


def clear_cut() -> None:
    """Remove the files that a full disk has cut.

    Each message would end Celery's process once, and kombu mends no exchange: that would end it at every start.
    """
    removed = 0
    for path in (path for folder in _folders() for path in (*folder.glob("*.msg"), *folder.glob("*.exchange"))):
        with contextlib.suppress(FileNotFoundError):
            if not _is_json(path):
                path.unlink()
                removed += 1
    if removed:
        logger.warning("%d files that are not whole were removed from %s", removed, settings.CELERY_DIR)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _folders() -> list[Path]:
    options: dict[str, str] = settings.CELERY_BROKER_TRANSPORT_OPTIONS
    if "data_folder_in" not in options:
        return []
    return [Path(options["data_folder_in"]), Path(options["control_folder"]), _taken()]


def _taken() -> Path:
    return Path(settings.CELERY_DIR / "taken")
