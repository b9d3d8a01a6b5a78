"""Errors of the gateway's own, and OpenAI's envelope for them.

The upstream's errors are not here: they pass as they came. Envelope: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import json


class GatewayError(Exception):
    """An answer that the gateway gives by itself: an HTTP status and OpenAI's error fields."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, retry_after_s: int | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.param = param
        self.headers: list[tuple[bytes, bytes]] = []

    def fields(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class PathRefusedError(GatewayError):
    """The path means one thing as written and another once normalised."""

    status = 400
    type = "invalid_request_error"
    code = "path_refused"


class BadRequestError(GatewayError):
    status = 400
    type = "invalid_request_error"
    code = "bad_request"


class UnknownUrlError(GatewayError):
    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class KeyBlockedError(GatewayError):
    """The operator has blocked the key."""

    status = 403
    type = "invalid_request_error"
    code = "key_blocked"


class KeyNotRegisteredError(GatewayError):
    """Only registered keys pass here, and this is none."""

    status = 403
    type = "invalid_request_error"
    code = "key_not_registered"


class AddressNotAllowedError(GatewayError):
    """The key, or this gateway, may not be used from the client's network."""

    status = 403
    type = "invalid_request_error"
    code = "address_not_allowed"


class ModelNotAllowedError(GatewayError):
    """The key may not use this model, or nobody can tell which model the request is for."""

    status = 403
    type = "invalid_request_error"
    code = "model_not_allowed"


class ModelUnpricedError(GatewayError):
    """The key has a limit of money, and nobody can tell what the request may cost."""

    status = 403
    type = "invalid_request_error"
    code = "model_unpriced"


class RateLimitedError(GatewayError):
    """So much in a minute, or at once, is not allowed; `type` is OpenAI's `requests` or `tokens`."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, type: str = "requests", retry_after_s: int | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.type = type


class SpendLimitedError(GatewayError):
    """The month's money is spent, or reserved by requests in progress."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"


class LimitsUnavailableError(GatewayError):
    """Nobody can tell now whether a limit is met, and the operator wants nothing to pass then."""

    status = 503
    type = "server_error"
    code = "limits_unavailable"


class RequestTimeoutError(GatewayError):
    """The client fell silent inside its own request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class BodyTooLargeError(GatewayError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class HeadersTooLargeError(GatewayError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class OverloadedError(GatewayError):
    status = 503
    type = "server_error"
    code = "gateway_overloaded"


class ShuttingDownError(GatewayError):
    status = 503
    type = "server_error"
    code = "gateway_restarting"


class UpstreamConnectionError(GatewayError):
    """The upstream could not be reached, or left before it had answered."""

    status = 502
    type = "server_error"
    code = "upstream_unreachable"


class UpstreamProtocolError(GatewayError):
    """The upstream answered with something that is not HTTP."""

    status = 502
    type = "server_error"
    code = "upstream_invalid_response"


class UpstreamTimeoutError(GatewayError):
    status = 504
    type = "server_error"
    code = "upstream_timeout"


class ResponseCutError(Exception):
    """The answer cannot be finished: the server drops the connection so that the cut shows."""


def error_body(error: GatewayError) -> bytes:
    """Return `{"error": {"message", "type", "param", "code"}}` as UTF-8 JSON."""
    return json.dumps({"error": error.fields()}, ensure_ascii=False).encode()


def error_event(error: GatewayError) -> bytes:
    """Return the same envelope as one SSE event: OpenAI's SDKs raise when they read it."""
    return b"event: error\ndata: " + error_body(error) + b"\n\n"


def error_message(error: GatewayError, *, event_id: str | None = None) -> str:
    """Return the error as an `error` event of a WebSocket session; `event_id` is that of the client's own event.

    https://platform.openai.com/docs/api-reference/realtime-server-events/error, and for responses over a socket
    `status` beside it.
    """
    fields = error.fields() | {"event_id": event_id}
    return json.dumps({"type": "error", "status": error.status, "error": fields}, ensure_ascii=False)


def error_headers(error: GatewayError, *, request_id: str, body_bytes: int) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", b"%d" % body_bytes),
        (b"cache-control", b"no-store"),
    ]
    if request_id:
        headers += [(b"x-request-id", request_id.encode("ascii")), (b"x-proxy-request-id", request_id.encode("ascii"))]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    return headers + error.headers
