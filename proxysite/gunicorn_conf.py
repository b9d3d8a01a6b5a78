"""gunicorn's settings, for the master that `manage.py serve` becomes.

`gunicorn -c python:proxysite.gunicorn_conf` serves too, but runs nothing by the clock.
"""

import signal
from typing import Any

from proxysite import settings
from proxysite.greeting import greet

# To Python.
MASTER_ARGUMENTS = ("-m", "proxysite.master", "-c", "python:proxysite.gunicorn_conf")
# Tells a worker to end with its last stream, however long that runs; SIGTERM also says when at the latest.
RETIRE = signal.SIGUSR2

wsgi_app = "proxysite.asgi:application"
worker_class = "proxysite.server.GatewayWorker"
bind = [f"[{settings.HOST}]:{settings.PORT}" if ":" in settings.HOST else f"{settings.HOST}:{settings.PORT}"]
workers = settings.WORKERS
backlog = 4096
keepalive = int(settings.KEEPALIVE_SECONDS)
timeout = 60
# Longer than the worker's own limit: see GatewayWorker.
graceful_timeout = settings.GRACEFUL_TIMEOUT_SECONDS + 5
worker_tmp_dir = str(settings.VAR_DIR)
control_socket_disable = True
umask = 0o077  # whatever a worker writes is the operator's own
proc_name = "proxysite"
accesslog = None
errorlog = "-"
loglevel = settings.LOG_LEVEL.lower()
logconfig_dict = settings.LOGGING


def when_ready(server: Any) -> None:
    greet()
