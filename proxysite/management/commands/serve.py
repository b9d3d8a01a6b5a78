"""`manage.py serve`: the production command."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, connection

from proxysite import limiting
from proxysite.checks import OF_SETTINGS
from proxysite.gunicorn_conf import MASTER_ARGUMENTS

logger = logging.getLogger("proxysite.serve")


class Command(BaseCommand):
    help = "Serve the gateway and the site until told to stop; says where it is, and a line to try it."
    requires_system_checks = OF_SETTINGS

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            if trouble := limiting.uncountable():
                raise CommandError(f"{trouble}. Set REDIS_URL, or WORKERS=1.")
        except DatabaseError as exc:  # which stops no gateway
            logger.warning("limits in the admin could not be looked at: %s", type(exc).__name__)
        connection.close()  # of this process nothing is left
        # A process of its own image, so that a reload (SIGHUP) reads code and settings anew.
        os.chdir(settings.BASE_DIR)
        os.execv(sys.executable, [sys.executable, *MASTER_ARGUMENTS])  # noqa: S606 - no shell is wanted
