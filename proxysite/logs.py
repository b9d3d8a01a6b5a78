"""How log records are written: a line of text or a line of JSON each, with the request's id and without secrets."""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
from contextvars import ContextVar
from typing import Any

# The id of the request in whose course something is logged, "" outside of any.
current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")

# Nobody logs a key on purpose: this is for texts of libraries and of strangers.
_SECRETS = re.compile(
    r"(?P<key>\b(?:sk|sess|ek)[-_])[A-Za-z0-9_-]{6,}"
    r"|(?P<bearer>(?i:bearer)\s+)[^\s\"',]+"
    r"|(?P<query>(?i:api_?key|access_token|token|password)=)[^\s&\"']+"
    r"|(?P<subprotocol>openai-insecure-api-key\.)[^\s,\"']+"
    r"|(?P<login>://)[^\s/@\"']+(?=@)"
)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")


def redacted(text: str) -> str:
    """Return a text with "…" where keys, tokens and passwords stood."""
    return _SECRETS.sub(lambda found: f"{found[found.lastgroup or 0]}…", text)


class _Formatter(logging.Formatter):
    """Formats the message; `extra={"fields": {...}}` of a log call stands beside it."""

    def message_of(self, record: logging.LogRecord) -> str:
        # One record is one line, whatever a stranger's text holds.
        return _CONTROLS.sub(" ", record.getMessage())

    def traceback_of(self, record: logging.LogRecord) -> str:
        if record.name.startswith("django.security."):  # a stranger's request brings these about: a line says it all
            return ""
        return self.formatException(record.exc_info) if record.exc_info else record.exc_text or ""

    def fields_of(self, record: logging.LogRecord) -> dict[str, Any]:
        request_id = current_request_id.get()
        named = {"request_id": request_id} if request_id else {}
        return named | getattr(record, "fields", {})


class LineFormatter(_Formatter):
    """`2026-11-22 10:00:00,000 WARNING gateway.relay: what happened request_id=…`, a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record)} {record.levelname} {record.name}: {self.message_of(record)}"
        fields = "".join(f" {name}={_CONTROLS.sub(' ', str(value))}" for name, value in self.fields_of(record).items())
        traceback = self.traceback_of(record)
        return redacted(f"{head}{fields}\n{traceback}" if traceback else head + fields)


class JsonFormatter(_Formatter):
    """`{"time", "level", "logger", "process", "message"}`, in a request's course `request_id`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        entry: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": redacted(self.message_of(record)),
        }
        for name, value in self.fields_of(record).items():
            entry[name] = redacted(value) if isinstance(value, str) else value
        if traceback := self.traceback_of(record):
            entry["exception"] = redacted(traceback)
        return json.dumps(entry, default=str)


def configuration(*, form: str, level: str, logs_access: bool) -> dict[str, Any]:
    """Return the settings of all logging, gunicorn's included, for `logging.config.dictConfig`."""
    formatters = {
        "line": {"()": "proxysite.logs.LineFormatter"},
        "json": {"()": "proxysite.logs.JsonFormatter"},
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": formatters,
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": form}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            # Both would write full query strings, in which callers of /pro put keys.
            "django.request": {"level": "ERROR"},
            "django.server": {"level": "ERROR"},
            "axes": {"level": "WARNING"},
            "httpx2": {"level": "WARNING"},
            # Several lines a minute that say nothing; failures are errors, and what a task did is its own to say.
            "celery": {"level": "WARNING"},
            "django_celery_beat": {"level": "WARNING"},
            "websockets": {"level": "CRITICAL"},
            # A line for each span that a collector who is away has no room for.
            "opentelemetry.sdk._shared_internal": {"level": "ERROR"},
            "gateway.access": {"level": "INFO" if logs_access else "CRITICAL"},
            # uvicorn takes over this one's handlers, so they cannot be the root's.
            "gunicorn.error": {"handlers": ["stderr"], "level": level, "propagate": False},
            "gunicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
        },
    }
