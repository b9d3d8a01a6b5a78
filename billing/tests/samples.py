"""Events and keys for tests, made of plain values."""

from __future__ import annotations

import datetime as dt
import itertools
from typing import Any

from billing import keys
from billing.events import Usage, UsageEvent

NOW = dt.datetime(2026, 11, 20, 12, 0, tzinfo=dt.UTC)
API_KEY = "sk-test-0123456789abcdefghij"
_numbers = itertools.count(1)


def key_fingerprint(name: str) -> str:
    return keys.fingerprint(name.encode(), pepper=b"test")


def event(**given: Any) -> UsageEvent:
    """Return a priced, completed chat completion of key "a" at NOW, with what is given instead."""
    number = next(_numbers)
    at: dt.datetime = given.pop("at", NOW)
    fields: dict[str, Any] = {
        "id": f"{number:012x}",
        "started_at": at.timestamp(),
        "key_fingerprint": key_fingerprint(given.pop("key", "a")),
        "key_hint": "sk-…wxyz",
        "method": "POST",
        "endpoint": "/v1/chat/completions",
        "model": "gpt-4o-mini",
        "status": 200,
        "usage_source": "upstream",
        "usage": Usage(input_tokens=1000, cached_input_tokens=200, output_tokens=500),
        "first_byte_ms": 120,
        "duration_ms": 900,
        "proxy_ms": 0.25,
        "request_bytes": 300,
        "response_bytes": 700,
    }
    return UsageEvent(**fields | given)
