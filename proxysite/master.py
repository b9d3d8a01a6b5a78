"""`python -m proxysite.master`: gunicorn's master, which also keeps Celery running where nobody else does."""

from __future__ import annotations

import math
import sys
from typing import Any

from gunicorn.app.wsgiapp import WSGIApplication
from gunicorn.arbiter import Arbiter

from proxysite import settings
from proxysite.embedded import EmbeddedCelery
from proxysite.gunicorn_conf import MASTER_ARGUMENTS, RETIRE
from proxysite.server import GatewayWorker


class Master(Arbiter):
    """Looks after Celery's process in the loop in which gunicorn looks after its workers: no thread, one owner.

    A hook of gunicorn's would not do: none is called again and again. A reload (SIGHUP) starts Celery anew too; an end
    comes to it after the workers, so after their streams.

    Workers that a reload has replaced are retired, not stopped, and are no longer counted: one that is needed is
    started however many of those are left. They are retired when those that replace them accept connections, and not
    before: the time that a start takes would be one in which nobody does.
    """

    WORKERS: dict[int, GatewayWorker]  # by process, oldest first

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.START_CTX["args"] = [sys.executable, *MASTER_ARGUMENTS]
        self._celery = EmbeddedCelery(directory=settings.BASE_DIR, log=self.log) if settings.CELERY_EMBEDDED else None
        self._retired: set[int] = set()

    def manage_workers(self) -> None:
        self._retired.intersection_update(self.WORKERS)
        serving = [pid for pid in self.WORKERS if pid not in self._retired]
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
