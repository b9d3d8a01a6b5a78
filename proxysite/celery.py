"""The Celery application, for `celery -A proxysite worker` and `… beat`, or embedded in `manage.py serve`.

Its settings are Django's CELERY_*; what runs when stands in `proxysite.schedule`. Every task may run twice, late, or
not at all this time: a broker of files delivers nothing anew after a crash.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, signals

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proxysite.settings")

app = Celery("proxysite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@signals.setup_logging.connect
def keep_djangos_logging(**_: Any) -> None:
    """Keep LOGGING as it is: Celery sets up logging of its own unless somebody listens here."""


@signals.worker_init.connect
def take_over_files(**_: Any) -> None:
    from proxysite import file_broker  # it reads settings, which are ready only now

    file_broker.take_over()
