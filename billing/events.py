"""The usage event: what the gateway says of one request, once, however it ended."""

from __future__ import annotations

import operator
from typing import Literal, get_args

import msgspec

Outcome = Literal["completed", "client_closed", "upstream_error", "timeout", "refused"]
UsageSource = Literal["upstream", "estimated", "none"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)
USAGE_SOURCES: tuple[str, ...] = get_args(UsageSource)


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Quantities of one request in disjoint buckets: each token is in exactly one, `reasoning_tokens` excepted.

    `reasoning_tokens` is the part of `output_tokens` that was thinking: informational, never priced by itself.
    """

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    cached_audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    cached_image_input_tokens: int = 0
    image_output_tokens: int = 0
    images: int = 0
    characters: int = 0
    seconds: float = 0.0

    def plus(self, other: Usage) -> Usage:
        """Return what both have used together."""
        return Usage(*map(operator.add, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))


class UsageEvent(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One request. Times are seconds since the epoch or milliseconds, as named; no key and no body, ever.

    `id` is unique for all time and sorts by time; recording an event twice adds nothing.
    `key_fingerprint` is HMAC-SHA256(pepper, key) in hex, "" where no key was sent; `endpoint` is a route of
    OpenAI's, such as `/v1/chat/completions` or `/v1/files/{file_id}`, or "other". `first_byte_ms` is 0 where no byte of
    an answer came, else 1 at least.
    """

    id: str
    started_at: float
    key_fingerprint: str = ""
    key_hint: str = ""
    method: str = ""
    endpoint: str = "other"
    model: str = ""
    service_tier: str = ""
    is_batch: bool = False
    is_stream: bool = False
    status: int = 0
    outcome: Outcome = "completed"
    usage_source: UsageSource = "none"
    usage: Usage = Usage()
    upstream_request_id: str = ""
    first_byte_ms: int = 0
    duration_ms: int = 0
    proxy_ms: float = 0.0
    request_bytes: int = 0
    response_bytes: int = 0
