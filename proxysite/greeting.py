"""What whoever starts the service is told: where it is, and a line to try it."""

from __future__ import annotations

import logging
import sys

from proxysite import settings

logger = logging.getLogger("proxysite.serve")


def greet() -> None:
    """Say where the service is. Once its port is open: the line works at once, though the workers still start."""
    address = _address()
    if settings.LOG_FORMAT == "json":
        logger.info("serving %s for %s", address, settings.UPSTREAM_URL)
        return
    key = settings.SANDBOX_KEY if settings.SANDBOX_ENABLED else "$OPENAI_API_KEY"
    # Double quotes where the shell shall read the variable.
    quote = "'" if settings.SANDBOX_ENABLED else '"'
    sys.stdout.write(
        f"Serving {address} for {settings.UPSTREAM_URL}; admin at {address}/admin/\n"
        f"Try it:\n\n"
        f"  curl -N {address}/v1/chat/completions -H {quote}Authorization: Bearer {key}{quote} "
        f"-H 'Content-Type: application/json' "
        '-d \'{"model": "gpt-4o-mini", "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}\'\n\n'
    )
    sys.stdout.flush()


def _address() -> str:
    host = "127.0.0.1" if settings.HOST in ("0.0.0.0", "::") else settings.HOST  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{settings.PORT}" if ":" in host else f"http://{host}:{settings.PORT}"
