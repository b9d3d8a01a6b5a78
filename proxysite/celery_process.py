"""`python -m proxysite.celery_process`: Celery's worker and beat in one process, for as long as the parent lives."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

_NICENESS = 10
_PARENT_LOOK_S = 0.5

logger = logging.getLogger("proxysite.celery_process")


def main() -> None:
    os.nice(_NICENESS)  # first of all: even the imports must not make a stream late
    os.umask(0o077)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    import django

    from proxysite import celery  # noqa: F401 - it says where the settings are

    django.setup()
    with _alone():
        run()


def _end_with(parent: int) -> None:
    """End at once when the parent is gone, however it went: whatever a task does is done in transactions."""
    while os.getppid() == parent:
        time.sleep(_PARENT_LOOK_S)
    os._exit(1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other such process works in VAR_DIR: one master may be taking over from another."""
    from django.conf import settings

    with (settings.CELERY_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run() -> None:
    """Run worker and beat until SIGTERM."""
    from celery import signals
    from celery.exceptions import SecurityWarning

    from proxysite.celery import app

    # It warns of running as root, for messages that are pickles: ours are JSON.
    warnings.simplefilter("ignore", SecurityWarning)
    current = _CurrentTask(time_limit_s=app.conf.task_time_limit)
    signals.task_prerun.connect(current.begin)
    signals.task_postrun.connect(current.end)
    signals.worker_ready.connect(current.take_signals)
    worker = app.Worker(
        pool="solo", concurrency=1, quiet=True, without_gossip=True, without_mingle=True, without_heartbeat=True
    )
    threading.Thread(target=_beat, args=(app,), name="beat", daemon=True).start()
    worker.start()


def _beat(app: Any) -> None:
    from celery.beat import Service

    try:
        Service(app, scheduler_cls=app.conf.beat_scheduler).start()
    except Exception:  # the edge of a thread; the parent starts another process, whose database may be there
        logger.exception("beat ended")
    os.kill(os.getpid(), signal.SIGTERM)


class _CurrentTask:
    """What the worker is at: it ends in no task's middle, and no task goes on for ever.

    Celery's own end takes up to five seconds without any task, and its time limits need processes to kill.
    """

    def __init__(self, *, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._is_running = False
        self._is_ending = False

    def begin(self, **_: Any) -> None:
        self._is_running = True
        faulthandler.dump_traceback_later(self._time_limit_s, exit=True)

    def end(self, **_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._is_running = False
        if self._is_ending:
            os._exit(0)

    def take_signals(self, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self._end)

    def _end(self, *_: Any) -> None:
        self._is_ending = True
        if not self._is_running:
            os._exit(0)


if __name__ == "__main__":
    main()
