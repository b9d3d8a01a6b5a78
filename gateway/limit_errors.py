"""How a request beyond its limits is refused: in OpenAI's words, with the fields that its SDKs act on."""

from __future__ import annotations

from billing.fields import units_to_usd
from gateway import headers as wire
from gateway.errors import GatewayError, RateLimitedError, SpendLimitedError
from gateway.limits import Refusal, duration_text, next_month_s

# The longest that OpenAI's SDKs wait because they are told to; beyond it they wait as they like.
_LONGEST_RETRY_S = 60


def error_of(refusal: Refusal, now: float) -> GatewayError:
    """Return the error that tells a client of a refusal; `now` in seconds since 1970."""
    who = "API key" if refusal.scope == "key" else "network address"
    wait_s = refusal.retry_s
    if refusal.reason == "spend":
        return _spend_error(refusal, who, now)
    retry_after_s = None if wait_s is None else min(max(-int(-wait_s // 1), 1), _LONGEST_RETRY_S)
    if refusal.reason == "streams":
        message = f"Too many requests in progress for this {who}: limit {refusal.limit}. Try again soon."
        told = _told(refusal, wait_s or 0.0)
        return _with_headers(RateLimitedError(message, retry_after_s=retry_after_s), wait_s, told)
    per = "min (RPM)" if refusal.reason == "requests" else "min (TPM)"
    what = f"for this {who} on {refusal.reason} per {per}: limit {refusal.limit}"
    if wait_s is None:
        message = f"Request too large {what}. Ask for less output, or send less input."
    else:
        message = f"Rate limit reached {what}. Please try again in {duration_text(wait_s)}."
    error = RateLimitedError(message, type=refusal.reason, retry_after_s=retry_after_s)
    return _with_headers(error, wait_s, _told(refusal, refusal.reset_s))


def _told(refusal: Refusal, reset_s: float) -> wire.RawHeaders:
    kind = refusal.reason.encode()
    return [
        (b"x-ratelimit-limit-" + kind, b"%d" % refusal.limit),
        (b"x-ratelimit-remaining-" + kind, b"%d" % refusal.remaining),
        (b"x-ratelimit-reset-" + kind, duration_text(reset_s).encode()),
    ]


def _spend_error(refusal: Refusal, who: str, now: float) -> GatewayError:
    limit, left = (units_to_usd(units) for units in (refusal.limit, refusal.remaining))
    if refusal.retry_s is not None:
        message = f"What is left of this {who}'s spend limit is reserved by requests in progress. Try again soon."
        return _with_headers(SpendLimitedError(message, retry_after_s=1), refusal.retry_s, [])
    message = (
        f"This request may cost more than is left of this {who}'s spend limit: {left:.4f} of {limit:.2f} USD "
        "for this month (UTC)."
    )
    return _with_headers(SpendLimitedError(message, retry_after_s=next_month_s(now)), None, [])


def _with_headers(error: GatewayError, wait_s: float | None, told: wire.RawHeaders) -> GatewayError:
    """Add what OpenAI's SDKs act on: when to try again, to the millisecond, or that it is of no use."""
    error.headers = list(told)
    if wait_s is None:
        error.headers.append((b"x-should-retry", b"false"))
    elif wait_s <= _LONGEST_RETRY_S:
        error.headers.append((b"retry-after-ms", b"%d" % -int(-wait_s * 1000 // 1)))
    return error
