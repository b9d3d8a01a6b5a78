"""Which header fields cross the gateway, in either direction.

Hop-by-hop fields: RFC 9110 §7.6.1. Everything else that is end-to-end passes, duplicates and order kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gateway.errors import BadRequestError

RawHeaders = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    )
)
# `Expect` is settled between the client and this server; `Host` is the upstream's own.
_NOT_TO_UPSTREAM = _HOP_BY_HOP | frozenset((b"host", b"expect", b"cookie", b"cookie2", b"origin", b"referer"))
# Whatever proxies and CDNs before us wrote down about the client.
_NAMES_THE_CLIENT = frozenset(
    (
        b"forwarded",
        b"via",
        b"x-real-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-original-forwarded-for",
        b"x-envoy-external-address",
        b"x-azure-clientip",
        b"x-appengine-user-ip",
        b"fastly-client-ip",
        b"fly-client-ip",
        b"true-client-ip",
        b"client-ip",
        b"cdn-loop",
    )
)
_NAMES_THE_CLIENT_PREFIXES = (b"x-forwarded-", b"cf-")
_WEBSOCKET_HANDSHAKE = b"sec-websocket-"
_NOT_TO_CLIENT = _HOP_BY_HOP | frozenset((b"set-cookie", b"set-cookie2", b"strict-transport-security", b"alt-svc"))
_CORS_PREFIX = b"access-control-"
_NAMES_NOTHING = (b"keep-alive", b"close")

# Without credentials "*" means every name except Authorization; the names are for engines that read it literally.
_EXPOSED = (
    b"*, x-request-id, x-proxy-request-id, retry-after, retry-after-ms, openai-organization, openai-processing-ms, "
    b"openai-version, openai-model, openai-project, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, "
    b"x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, "
    b"x-ratelimit-reset-tokens, x-should-retry, content-disposition, server-timing"
)
CORS_HEADERS: RawHeaders = [
    (b"access-control-allow-origin", b"*"),
    (b"access-control-expose-headers", _EXPOSED),
]


class ToUpstream(NamedTuple):
    """What goes up; `body_bytes` is the Content-Length, -1 for a chunked body, 0 where there is no body."""

    headers: RawHeaders
    body_bytes: int
    content_type: bytes


class ToClient(NamedTuple):
    """What comes down, and what it says of the body; `body_bytes` is -1 where no length is told.

    `content_encoding` is b"" for a body in plain bytes. A compressed event stream is no event stream here: it has no
    borders that could be seen.
    """

    headers: RawHeaders
    is_event_stream: bool
    has_trailers: bool
    body_bytes: int
    content_type: bytes
    content_encoding: bytes
    request_id: bytes


_PASSES, _STAYS, _CONNECTION, _LENGTH, _CODING, _TYPE, _ENCODING, _TRAILER, _REQUEST_ID, _KEY = range(10)
_UPSTREAM_ROLES = {
    b"connection": _CONNECTION,
    b"content-length": _LENGTH,
    b"transfer-encoding": _CODING,
    b"authorization": _KEY,
    b"content-type": _TYPE,
}
_CLIENT_ROLES = {
    b"connection": _CONNECTION,
    b"content-type": _TYPE,
    b"content-encoding": _ENCODING,
    b"content-length": _LENGTH,
    b"trailer": _TRAILER,
    b"x-request-id": _REQUEST_ID,
}


class Roles(dict[bytes, int]):
    """What a field's name means, by name, worked out once: of names of usual length only, and of so many.

    The names are a stranger's, who must not fill memory with them.
    """

    _MOST_NAMES = 4096
    _USUAL_NAME_BYTES = 64

    def __init__(self, role_of: Callable[[bytes], int]) -> None:
        super().__init__()
        self._role_of = role_of

    def __missing__(self, name: bytes) -> int:
        role = self._role_of(name)
        if len(name) <= self._USUAL_NAME_BYTES:
            if len(self) >= self._MOST_NAMES:
                self.clear()
            self[name] = role
        return role


def _role_upstream(name: bytes) -> int:
    if name in _UPSTREAM_ROLES:
        return _UPSTREAM_ROLES[name]
    stays = name in _NOT_TO_UPSTREAM or names_the_client(name) or name.startswith(_WEBSOCKET_HANDSHAKE)
    return _STAYS if stays else _PASSES


def _role_to_client(name: bytes) -> int:
    lower = name.lower()
    if lower in _CLIENT_ROLES:
        return _CLIENT_ROLES[lower]
    return _STAYS if lower in _NOT_TO_CLIENT or lower.startswith(_CORS_PREFIX) else _PASSES


_roles_upstream, _roles_to_client = Roles(_role_upstream), Roles(_role_to_client)


def names_the_client(name: bytes) -> bool:
    """Return whether only a proxy writes a header field of this name, in lower case."""
    return name in _NAMES_THE_CLIENT or name.startswith(_NAMES_THE_CLIENT_PREFIXES)


def _named_by_connection(headers: RawHeaders) -> frozenset[bytes]:
    named: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection":
            named.update(part.strip().lower() for part in value.split(b","))
    # Framing and the key are never a hop's own business, whatever a Connection field says of them.
    return frozenset(named - {b"content-length", b"transfer-encoding", b"host", b"authorization"})


def to_upstream(headers: RawHeaders, *, host: bytes) -> ToUpstream:
    """Return what goes upstream of a client's header fields (names in lower case), `Host` first.

    A chunked body stays chunked: its framing is ours, so the field is written anew. Raises BadRequestError where
    there are two keys: the one that is looked at here need not be the one that the upstream takes.
    """
    sent: RawHeaders = [(b"host", host)]
    body_bytes = 0
    content_type = b""
    has_key = False
    named: frozenset[bytes] = frozenset()
    for pair in headers:
        role = _roles_upstream[pair[0]]
        if role == _PASSES:
            sent.append(pair)
        elif role == _LENGTH:
            body_bytes = int(pair[1])
            sent.append(pair)
        elif role == _CODING:
            body_bytes = -1
            sent.append((b"transfer-encoding", b"chunked"))
        elif role == _CONNECTION and pair[1].lower() not in _NAMES_NOTHING:
            named = _named_by_connection(headers)
        elif role == _KEY:
            if has_key:
                raise BadRequestError("A request has at most one Authorization field.")
            has_key = True
            sent.append(pair)
        elif role == _TYPE:
            content_type = pair[1]
            sent.append(pair)
    if named:
        sent = [pair for pair in sent if pair[0] not in named]
    return ToUpstream(sent, body_bytes, content_type)


def to_client(headers: RawHeaders) -> ToClient:
    """Return what reaches the client of an upstream's header fields, CORS fields added."""
    sent: RawHeaders = []
    named: frozenset[bytes] = frozenset()
    has_trailers = False
    body_bytes = -1
    content_type = content_encoding = request_id = b""
    for pair in headers:
        role = _roles_to_client[pair[0]]
        if role == _PASSES:
            sent.append(pair)
            continue
        if role == _STAYS:
            continue
        if role == _CONNECTION:
            if pair[1].lower() not in _NAMES_NOTHING:
                named = _named_by_connection(headers)
            continue
        sent.append(pair)
        if role == _TYPE:
            content_type = pair[1]
        elif role == _LENGTH:
            body_bytes = int(pair[1])
        elif role == _REQUEST_ID:
            request_id = pair[1]
        elif role == _TRAILER:
            has_trailers = True
        elif pair[1].lower() != b"identity":
            content_encoding = pair[1]
    if named:
        sent = [pair for pair in sent if pair[0].lower() not in named]
    sent += CORS_HEADERS
    is_event_stream = not content_encoding and content_type[:17].lower() == b"text/event-stream"
    return ToClient(sent, is_event_stream, has_trailers, body_bytes, content_type, content_encoding, request_id)


def without_length(headers: RawHeaders) -> RawHeaders:
    return [pair for pair in headers if pair[0].lower() != b"content-length"]


def preflight(request_headers: RawHeaders) -> RawHeaders:
    """Return the header fields that allow whatever a CORS preflight asks for, credentials excepted."""
    asked = dict(request_headers)
    allowed = [
        (b"access-control-allow-origin", b"*"),
        (b"access-control-allow-methods", asked.get(b"access-control-request-method", b"*")),
        (b"access-control-max-age", b"86400"),
        (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"),
        (b"content-length", b"0"),
    ]
    if b"access-control-request-headers" in asked:
        allowed.append((b"access-control-allow-headers", asked[b"access-control-request-headers"]))
    if asked.get(b"access-control-request-private-network") == b"true":
        # A page on the open web that talks to a proxy on the user's own machine or network.
        allowed.append((b"access-control-allow-private-network", b"true"))
    return allowed


def is_preflight(headers: RawHeaders) -> bool:
    """Return whether an OPTIONS request is a CORS preflight."""
    names = {name for name, _ in headers}
    return b"origin" in names and b"access-control-request-method" in names


def bearer_key(headers: RawHeaders) -> bytes:
    """Return the API key of `Authorization: Bearer`, or of the browser's WebSocket subprotocol, or b""."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
    for name, value in headers:
        if name == b"sec-websocket-protocol":
            for part in value.split(b","):
                if part.strip().startswith(b"openai-insecure-api-key."):
                    return part.strip()[24:]
    return b""
