"""`manage.py serve`: the production command."""

from __future__ import annotations

import os
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand


class Command(BaseCommand):
    help = "Serve the gateway and the site until told to stop; says where it is, and a line to try it."

    def handle(self, *args: Any, **options: Any) -> None:
        host = "127.0.0.1" if settings.HOST in ("0.0.0.0", "::") else settings.HOST  # noqa: S104 - compared, not bound
        address = f"http://[{host}]:{settings.PORT}" if ":" in host else f"http://{host}:{settings.PORT}"
        key = settings.SANDBOX_KEY if settings.SANDBOX_ENABLED else "$OPENAI_API_KEY"
        self.stdout.write(
            f"Serving {address} for {settings.UPSTREAM_URL}; admin at {address}/admin/\n"
            f"Try it:\n\n"
            f"  curl -N {address}/v1/chat/completions -H 'Authorization: Bearer {key}' "
            f"-H 'Content-Type: application/json' "
            '-d \'{"model": "gpt-4o-mini", "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}\'\n'
        )
        self.stdout.flush()
        # A process of its own image, so that a reload (SIGHUP) reads code and settings anew.
        arguments = [sys.executable, "-m", "gunicorn", "-c", "python:proxysite.gunicorn_conf"]
        os.chdir(settings.BASE_DIR)
        os.execv(sys.executable, arguments)  # noqa: S606 - no shell is wanted
