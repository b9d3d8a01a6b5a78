"""One line in the log for each request that has ended, where the operator wants that: no key, no body, no query."""

from __future__ import annotations

import logging
import re

from billing.events import UsageEvent
from gateway import headers as wire

logger = logging.getLogger("gateway.access")

_PRESENTABLE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,100}")


def log_access(event: UsageEvent, *, request_id: str, headers: wire.RawHeaders) -> None:
    """Log a request, under its route instead of the path that was asked for; `headers` are the client's."""
    fields = {
        "request_id": request_id,
        "method": event.method,
        "route": event.endpoint,
        "status": event.status,
        "outcome": event.outcome,
        "duration_ms": event.duration_ms,
        "first_byte_ms": event.first_byte_ms,
        "proxy_ms": event.proxy_ms,
        "request_bytes": event.request_bytes,
        "response_bytes": event.response_bytes,
        "key": event.key_hint,
        "upstream_request_id": event.upstream_request_id,
        "client_request_id": client_request_id(headers),
    }
    logger.info("request", extra={"fields": fields})


def client_request_id(headers: wire.RawHeaders) -> str:
    """Return the `x-request-id` that the client sent, "" if there is none, or if it holds the key or looks odd."""
    for name, value in headers:
        if name == b"x-request-id":
            api_key = wire.api_key_of(headers)
            is_presentable = _PRESENTABLE.fullmatch(value) and not (api_key and api_key in value)
            return value.decode("ascii") if is_presentable else ""
    return ""
