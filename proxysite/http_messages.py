"""Requests as bytes and as fields: where one ends, what its fields and its target say, how one is refused."""

from __future__ import annotations

import contextlib
import http
import re
import secrets
import time

import httptools

from gateway.errors import BadRequestError, GatewayError, error_body, error_headers
from gateway.headers import CORS_HEADERS, Plan, RawHeaders

_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://[^/?#]*(/[^#]*)")
_LONGEST_LENGTH = 20  # of 64 bits
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]")
_STAND_IN_METHOD = b"PUT"  # not one of those with which llhttp takes RTSP for HTTP, as POST


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


def offers_websocket(headers: RawHeaders) -> bool:
    """Return whether a request offers to go on as a WebSocket, among other protocols perhaps (RFC 9110 §7.8)."""
    return b"upgrade" in _options(headers, b"connection") and b"websocket" in _options(headers, b"upgrade")


def _options(headers: RawHeaders, field: bytes) -> set[bytes]:
    return {option.strip().lower() for name, value in headers if name == field for option in value.split(b",")}


def only_to_websocket(headers: RawHeaders) -> RawHeaders:
    """Return a handshake's fields as if it had offered to go on as nothing else."""
    return [*(pair for pair in headers if pair[0] != b"upgrade"), (b"upgrade", b"websocket")]


def stand_in_line(behind: bytes) -> bytes:
    """Return a request line that llhttp can read, of what stands behind a method that it may not know."""
    target, blank, version = behind.partition(b" ")
    if target[:4] in (b"/v1/", b"/v1?"):
        # Byte for byte, as clients send them that do not encode; the site's pages know no such paths.
        target = _BEYOND_ASCII.sub(b"_", target)
    return b" ".join((_STAND_IN_METHOD, target)) + blank + version


def stand_in_head(url: bytes, version: str, headers: RawHeaders) -> bytes:
    """Return a head that llhttp can read, as if the request had not offered to upgrade."""
    lines = [b"%b %b HTTP/%b" % (_STAND_IN_METHOD, _BEYOND_ASCII.sub(b"_", url), version.encode())]
    lines += [b"%b: %b" % pair for pair in _without_upgrade(headers)]
    return b"\r\n".join((*lines, b"", b""))


def _without_upgrade(headers: RawHeaders) -> RawHeaders:
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


def last_answer(error: GatewayError) -> bytes:
    """Return an answer of the server's own, behind which its connection ends."""
    body = error_body(error)
    # It is in no ledger: nobody has been asked anything.
    request_id = f"{time.time_ns():016x}{secrets.token_hex(12)}"
    fields = error_headers(error, request_id=request_id, body_bytes=len(body))
    lines = [b"%b: %b\r\n" % field for field in (*fields, *CORS_HEADERS, (b"connection", b"close"))]
    head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n".encode("ascii")
    return b"".join((head, *lines, b"\r\n", body))
