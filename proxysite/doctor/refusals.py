"""Answers by which an instance itself refuses a key that it limits: no fault of the way to it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gateway import errors

_OTHER_KEY = "give --key one without limits (0 on its page in the admin)"
_ADDRESSES = "Limits of addresses are the settings ADDRESS_*."
_CURES = {
    errors.RateLimitedError.code: f"Wait a minute, or {_OTHER_KEY}. {_ADDRESSES}",
    errors.SpendLimitedError.code: f"To look at it, {_OTHER_KEY}, or one with money left. {_ADDRESSES}",
    errors.ModelNotAllowedError.code: f"To look at it, {_OTHER_KEY} that may use any model.",
    errors.ModelUnpricedError.code: f"Under a limit of money models without a price are refused: {_OTHER_KEY}.",
    errors.AddressNotAllowedError.code: "Ask from a network of ALLOWED_NETWORKS, or of the key's in the admin.",
    errors.KeyNotRegisteredError.code: "Register the key in the admin, or give --key one that is.",
    errors.KeyBlockedError.code: "Unblock the key in the admin, or give --key another.",
    errors.LimitsUnavailableError.code: "Look at Redis there: ON_LIMITS_UNAVAILABLE is refuse.",
}


class Refusals:
    """Which parts could not be looked at since the key is limited, by status and code of the answer."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}
        self._cures: dict[str, None] = {}

    def note(self, part: str, status: int, headers: Mapping[str, str], body: bytes) -> bool:
        """Return whether this is such an answer, and remember that it was."""
        code = _code_of(headers, body)
        if status not in (403, 429, 503) or code not in _CURES:
            return False
        self._parts.setdefault(f"{status} {code}", []).append(part)
        self._cures[_CURES[code]] = None
        return True

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def said(self) -> str:
        """What was not looked at, and why: `streams, errors (403 model_not_allowed)`."""
        return "; ".join(f"{', '.join(parts)} ({answer})" for answer, parts in self._parts.items())

    @property
    def cure(self) -> str:
        return "\n".join(self._cures)


def _code_of(headers: Mapping[str, str], body: bytes) -> str:
    """Return the code of an error of the instance's own, "" of any other answer.

    What the upstream has answered has a Server-Timing, and its own x-request-id.
    """
    request_id = headers.get("x-proxy-request-id")
    if not request_id or headers.get("x-request-id") != request_id or "server-timing" in headers:
        return ""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""
