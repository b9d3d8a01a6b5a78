"""Requests as bytes and as fields: where one ends, what its fields and its target say, what is left of an upgrade."""

from __future__ import annotations

import contextlib
import re

import httptools

from gateway.errors import BadRequestError
from gateway.headers import Plan, RawHeaders

_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://[^/?#]*(/[^#]*)")
_LONGEST_LENGTH = 20  # of 64 bits


class _Counter:
    messages = 0

    def on_message_complete(self) -> None:
        self.messages += 1


def end_of_messages(data: bytes, count: int) -> int:
    """Return where the first so many messages in `data` end, which httptools tells nobody: by halving, so seldom."""
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        counter = _Counter()
        with contextlib.suppress(httptools.HttpParserError):
            httptools.HttpRequestParser(counter).feed_data(data[:middle])
        if counter.messages >= count:
            high = middle
        else:
            low = middle + 1
    return low


def without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return a request's fields as if it had not offered to upgrade; what else `Connection` says stays."""
    kept = []
    for name, value in headers:
        if name == b"connection":
            options = [option for option in value.split(b",") if option.strip().lower() != b"upgrade"]
            if options:
                kept.append((name, b",".join(options)))
        elif name != b"upgrade":
            kept.append((name, value))
    return kept


def path_and_query(url: bytes) -> bytes:
    """Return what a request's target says behind the host. Raises BadRequestError."""
    if url[:1] != b"/":
        # Absolute form (RFC 9112 §3.2.2) says what `Host` says: where to is settled here, not by clients.
        parts = _ABSOLUTE_FORM.fullmatch(url)
        if parts is None:
            raise BadRequestError("The request target is not a path.")
        url = parts[1]
    if url.find(b"#") >= 0:
        raise BadRequestError("A request target has no fragment.")
    return url


def check_fields(headers: RawHeaders, plan: Plan, version: str) -> bool:
    """Settle what fields say to this server; return whether an interim answer is waited for. Raises BadRequestError."""
    if version not in ("1.1", "1.0"):
        raise BadRequestError(f"HTTP/{version} is not spoken here.")
    if b"transfer-encoding" in plan.at:
        codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
        if codings != [b"chunked"] or version == "1.0":
            raise BadRequestError("The only transfer coding is chunked, over HTTP/1.1.")
    if plan.hosts != 1 and version == "1.1":
        raise BadRequestError("An HTTP/1.1 request has exactly one Host field.")
    # RFC 9110 §10.1.1: of HTTP/1.0 an expectation is ignored, whose clients know no interim answers.
    return version == "1.1" and (b"expect", b"100-continue") in [(name, value.lower()) for name, value in headers]


def check_length(headers: RawHeaders, plan: Plan) -> None:
    """Raise BadRequestError for a length that only llhttp can read: with as many zeros before it as one likes."""
    length_at = plan.at.get(b"content-length")
    if length_at is not None and len(headers[length_at][1]) > _LONGEST_LENGTH:
        raise BadRequestError("This is no usual Content-Length.")


def length_of(headers: RawHeaders, plan: Plan) -> int:
    """Return what Content-Length says, -1 where there is none."""
    at = plan.at.get(b"content-length")
    return -1 if at is None else int(headers[at][1])
