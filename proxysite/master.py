"""`python -m proxysite.master`: gunicorn's master, which also keeps Celery running where nobody else does."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from proxysite import settings
from proxysite.embedded import EmbeddedCelery
from proxysite.gunicorn_conf import MASTER_ARGUMENTS, RETIRE
from proxysite.server import GatewayWorker

logger = logging.getLogger("gunicorn.error")  # with what the master itself says of its workers


class Master(Arbiter):
    """Looks after Celery's process in the loop in which gunicorn looks after its workers: no thread, one owner.

    A hook of gunicorn's would not do: none is called again and again. A reload (SIGHUP) starts Celery anew too; an end
    comes to it after the workers, so after their streams.

    Workers that a reload has replaced are retired, not stopped, and are no longer counted: one that is needed is
    started however many of those are left. They are retired when those that replace them accept connections, and not
    before: the time that a start takes would be one in which nobody does. Where one cannot start, those before it stay.
    """

    WORKERS: dict[int, GatewayWorker]  # by process, oldest first

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.START_CTX["args"] = [sys.executable, *MASTER_ARGUMENTS]
        self._celery = EmbeddedCelery(directory=settings.BASE_DIR, log=self.log) if settings.CELERY_EMBEDDED else None
        self._retired: set[int] = set()

    def manage_workers(self) -> None:
        self._retired.intersection_update(self.WORKERS)
        serving = self._serving()
        for _ in range(self.num_workers - len(serving)):
            self.spawn_worker()
        replaced, kept = serving[: -self.num_workers], serving[-self.num_workers :]
        if all(self.WORKERS[pid].has_begun for pid in kept):
            self._retired.update(replaced)
        for pid in self._retired:
            # Again and again: a worker that was just being started has not heard it.
            self.kill_worker(pid, RETIRE)
        if self._celery is not None:
            self._celery.keep_running()

    def reap_workers(self) -> None:
        """Take leave of workers that have ended. Raises HaltServer for one that cannot start, where it is needed."""
        while True:
            try:
                super().reap_workers()
                return
            except HaltServer as exc:
                begun = [pid for pid in self._serving() if self.WORKERS[pid].has_begun]
                if len(begun) < self.num_workers:
                    raise
                # Of a reload: it must not take the service, and all its streams, with it.
                logger.error("%s Those before it go on.", exc.reason)

    def _serving(self) -> list[int]:
        """Return the processes of workers that are not retired, oldest first; they may not have begun yet."""
        return [pid for pid in self.WORKERS if pid not in self._retired]

    def reload(self) -> None:
        for worker in self.WORKERS.values():
            # gunicorn's waits for younger ones to end, deaf to signals, which here would be for as long as streams run.
            worker.age = math.inf
        super().reload()
        if self._celery is not None:
            self._celery.restart()

    def stop(self, graceful: bool = True) -> None:
        super().stop(graceful)
        if self._celery is not None:
            self._celery.stop()


class Server(WSGIApplication):
    def run(self) -> None:
        Master(self).run()


if __name__ == "__main__":
    Server("%(prog)s [OPTIONS]", prog="gunicorn").run()
