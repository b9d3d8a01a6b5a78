"""Models whose names ask for trouble, so that client developers can meet it on purpose. Pure."""

from __future__ import annotations

import enum

from gateway.sandbox.fields import SandboxError


class Manner(enum.Enum):
    """How an answer reaches the client; the transport acts on it."""

    PLAIN = "plain"
    SLOW = "slow"  # waits before the first byte and between events
    CUT = "cut"  # the line drops in the middle of the body
    HANG = "hang"  # no answer ever comes


_MANNERS = {"sandbox-slow": Manner.SLOW, "sandbox-cut": Manner.CUT, "sandbox-hang": Manner.HANG}

_REFUSALS = {
    "sandbox-400": SandboxError(
        400, "The model sandbox-400 finds every request invalid.", param="model", code="invalid_value"
    ),
    "sandbox-401": SandboxError(
        401, "Incorrect API key provided: the model sandbox-401 knows no key.", code="invalid_api_key"
    ),
    "sandbox-429": SandboxError(
        429,
        "Rate limit reached for sandbox-429 in organization sandbox on requests per min (RPM): "
        "Limit 3, Used 3, Requested 1. Please try again in 1s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers=(
            (b"retry-after", b"1"),
            (b"retry-after-ms", b"1000"),
            (b"x-ratelimit-limit-requests", b"3"),
            (b"x-ratelimit-remaining-requests", b"0"),
            (b"x-ratelimit-reset-requests", b"1s"),
        ),
    ),
    "sandbox-500": SandboxError(
        500,
        "The server had an error while processing your request: sandbox-500 was asked to.",
        kind="server_error",
    ),
    "sandbox-503": SandboxError(
        503,
        "The engine is currently overloaded, please try again later: sandbox-503 always is.",
        kind="server_error",
        code="service_unavailable",
        headers=((b"retry-after", b"1"),),
    ),
}

TROUBLE_MODELS = tuple(sorted({*_MANNERS, *_REFUSALS}))


def refusal_by(model: object) -> SandboxError | None:
    return _REFUSALS.get(model) if isinstance(model, str) else None


def manner_of(model: object) -> Manner:
    return _MANNERS.get(model, Manner.PLAIN) if isinstance(model, str) else Manner.PLAIN
