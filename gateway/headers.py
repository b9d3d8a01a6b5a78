"""Which header fields cross the gateway, in either direction.

Hop-by-hop fields: RFC 9110 §7.6.1. Everything else that is end-to-end passes, duplicates and order kept.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

from gateway.errors import BadRequestError, UpstreamProtocolError

RawHeaders = list[tuple[bytes, bytes]]

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2
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
# Trailers of a request are dropped, so `Trailer` would promise what does not come.
_NOT_TO_UPSTREAM = _HOP_BY_HOP | frozenset(
    (b"host", b"expect", b"trailer", b"cookie", b"cookie2", b"origin", b"referer")
)
# Whatever proxies and CDNs before us wrote down about the client.
_NAMES_THE_CLIENT = frozenset(
    (
        b"forwarded",
        b"forwarded-for",
        b"via",
        b"remote-addr",
        b"x-remote-addr",
        b"x-remote-ip",
        b"x-real-ip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-original-forwarded-for",
        b"x-originating-ip",
        b"x-proxyuser-ip",
        b"proxy-client-ip",
        b"wl-proxy-client-ip",
        b"x-envoy-external-address",
        b"x-azure-clientip",
        b"x-azure-socketip",
        b"x-appengine-user-ip",
        b"x-nf-client-connection-ip",
        b"x-sucuri-clientip",
        b"ali-cdn-real-ip",
        b"cdn-src-ip",
        b"do-connecting-ip",
        b"fastly-client-ip",
        b"fly-client-ip",
        b"fly-forwarded-for",
        b"incap-client-ip",
        b"true-client-ip",
        b"client-ip",
        b"cdn-loop",
    )
)
_NAMES_THE_CLIENT_PREFIXES = (b"x-forwarded", b"cf-", b"cloudfront-viewer-", b"x-vercel-")
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
    has_date: bool
    body_bytes: int
    content_type: bytes
    content_encoding: bytes
    request_id: bytes


_PASSES, _STAYS, _LOOKED_AT = range(3)
_TYPE, _LENGTH, _REQUEST_ID, _ENCODING = range(4)
_LOOKED_INTO = {
    b"content-type": _TYPE,
    b"content-length": _LENGTH,
    b"x-request-id": _REQUEST_ID,
    b"content-encoding": _ENCODING,
}
_SETTLED_BY_SERVER = frozenset((b"expect", b"transfer-encoding"))
_UPSTREAM_LOOKED_AT = frozenset((b"authorization", b"content-length", b"content-type"))
_CLIENT_LOOKED_AT = frozenset(
    (b"content-encoding", b"content-length", b"content-type", b"date", b"trailer", b"x-request-id")
)


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
    if name in _UPSTREAM_LOOKED_AT:
        return _LOOKED_AT
    stays = name in _NOT_TO_UPSTREAM or names_the_client(name) or name.startswith(_WEBSOCKET_HANDSHAKE)
    return _STAYS if stays else _PASSES


def _role_to_client(name: bytes) -> int:
    if name in _CLIENT_LOOKED_AT:
        return _LOOKED_AT
    return _STAYS if name in _NOT_TO_CLIENT or name.startswith(_CORS_PREFIX) else _PASSES


def names_the_client(name: bytes) -> bool:
    """Return whether only a proxy writes a header field of this name, in lower case."""
    return name in _NAMES_THE_CLIENT or name.startswith(_NAMES_THE_CLIENT_PREFIXES)


class Plan:
    """What the names of a list of fields mean, whatever their values are.

    Clients and upstreams send the same names again and again: what would be asked of each field is asked of the
    list, once. `at` has the place of the last field of each name that somebody looks at, in lower case, and `places`
    those of an answer's fields whose values matter; `codings` are those of transfer codings; `hosts` is how many of
    that name there are. `refusal` is why such a request must not go up, "" if it may. `is_usual`: there is one host,
    and neither a coding nor an expectation for the server to settle.
    """

    __slots__ = ("at", "codings", "connections", "hosts", "is_usual", "kept", "places", "refusal")

    def __init__(self, names: Sequence[bytes], roles: Roles, looked_at: frozenset[bytes]) -> None:
        names = [name.lower() for name in names]
        kept = [at for at, name in enumerate(names) if roles[name] != _STAYS]
        self.kept = _picker(kept)
        self.connections = [at for at, name in enumerate(names) if name == b"connection"]
        self.at = {name: at for at, name in enumerate(names) if name in looked_at}
        self.places = [(what, self.at[name]) for name, what in _LOOKED_INTO.items() if name in self.at]
        self.codings = [at for at, name in enumerate(names) if name == b"transfer-encoding"]
        self.hosts = names.count(b"host")
        self.is_usual = self.hosts == 1 and _SETTLED_BY_SERVER.isdisjoint(names)
        self.refusal = _refusal(names)


class Plans(dict[tuple[bytes, ...], Plan]):
    """Plans by names; of lists of usual length only, and of so many, as `Roles`."""

    _MOST_PLANS = 512
    _USUAL_NAMES = 40

    def __init__(self, role_of: Callable[[bytes], int], looked_at: frozenset[bytes]) -> None:
        super().__init__()
        self._roles = Roles(role_of)
        self._looked_at = looked_at

    def __missing__(self, names: tuple[bytes, ...]) -> Plan:
        plan = Plan(names, self._roles, self._looked_at)
        if len(names) <= self._USUAL_NAMES and max(map(len, names), default=0) <= Roles._USUAL_NAME_BYTES:
            if len(self) >= self._MOST_PLANS:
                self.clear()
            self[names] = plan
        return plan


_name_of = itemgetter(0)
_plans_upstream = Plans(_role_upstream, _UPSTREAM_LOOKED_AT | _SETTLED_BY_SERVER)
_plans_to_client = Plans(_role_to_client, _CLIENT_LOOKED_AT)


def plan_of(headers: RawHeaders) -> Plan:
    """Return what the names in a client's request mean."""
    return _plans_upstream[tuple(map(_name_of, headers))]


def _picker(places: list[int]) -> Callable[[RawHeaders], Iterable[tuple[bytes, bytes]]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda headers: [headers[at] for at in places]


def _refusal(names: list[bytes]) -> str:
    if names.count(b"authorization") > 1:
        # The one that is looked at here need not be the one that the upstream takes.
        return "A request has at most one Authorization field."
    if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        return "A request announces its body once."
    return "" if all(map(_TOKEN.fullmatch, names)) else "The name of a header field is no token."


def _named_by_connection(headers: RawHeaders, connections: list[int]) -> set[bytes]:
    """Return the names of the fields that concern one hop only, in lower case."""
    named: set[bytes] = set()
    for at in connections:
        value = headers[at][1].lower()
        if value not in _NAMES_NOTHING:
            named.update(part.strip() for part in value.split(b","))
    # Framing and the key are never a hop's own business, whatever a Connection field says of them.
    return named - {b"content-length", b"transfer-encoding", b"host", b"authorization"}


def to_upstream(headers: RawHeaders, *, host: bytes, plan: Plan | None = None) -> ToUpstream:
    """Return what goes upstream of a client's header fields (names in lower case), `Host` first.

    A chunked body stays chunked: its framing is ours, so the field is written anew. `plan` is that of the fields.
    Raises BadRequestError where there are two keys, a body that is announced twice, or a name that is no token.
    """
    if plan is None:
        plan = plan_of(headers)
    if plan.refusal:
        raise BadRequestError(plan.refusal)
    sent = [(b"host", host), *plan.kept(headers)]
    at = plan.at
    if plan.connections and (named := _named_by_connection(headers, plan.connections)):
        sent = [pair for pair in sent if pair[0] not in named]
    body_bytes = 0
    if b"content-length" in at:
        body_bytes = int(headers[at[b"content-length"]][1])
    elif b"transfer-encoding" in at:
        body_bytes = -1
        sent.append((b"transfer-encoding", b"chunked"))
    content_type = headers[at[b"content-type"]][1] if b"content-type" in at else b""
    return ToUpstream(sent, body_bytes, content_type)


def to_client(headers: RawHeaders) -> ToClient:
    """Return what reaches the client of an upstream's header fields, CORS fields added.

    Raises UpstreamProtocolError where the body is in a transfer coding that nobody asked for: it would reach the client
    still coded, and without the field that says so (RFC 9112 §6.1).
    """
    plan = _plans_to_client[tuple(map(_name_of, headers))]
    if plan.codings and [headers[at][1].strip().lower() for at in plan.codings] != [b"chunked"]:
        raise UpstreamProtocolError("The upstream answered in a transfer coding other than chunked.")
    sent = [*plan.kept(headers), *CORS_HEADERS]
    if plan.connections and (named := _named_by_connection(headers, plan.connections)):
        sent = [pair for pair in sent if pair[0].lower() not in named]
    content_type = content_encoding = request_id = b""
    body_bytes = -1
    for what, at in plan.places:
        value = headers[at][1]
        if what == _TYPE:
            content_type = value
        elif what == _LENGTH:
            body_bytes = int(value)
        elif what == _REQUEST_ID:
            request_id = value
        elif value.lower() != b"identity":
            content_encoding = value
    return ToClient(
        sent,
        not content_encoding and content_type[:17].lower() == b"text/event-stream",
        b"trailer" in plan.at,
        b"date" in plan.at,
        body_bytes,
        content_type,
        content_encoding,
        request_id,
    )


def interim_to_client(headers: RawHeaders) -> RawHeaders:
    """Return what reaches the client of the fields of an interim answer, which has no body to tell of."""
    connections = [at for at, (name, _) in enumerate(headers) if name.lower() == b"connection"]
    dropped = _named_by_connection(headers, connections) | {b"content-length", b"trailer"}
    lower = [(name.lower(), name, value) for name, value in headers]
    return [(name, value) for key, name, value in lower if key not in dropped and _role_to_client(key) != _STAYS]


def trailers_to_client(trailers: RawHeaders) -> RawHeaders:
    """Return what reaches the client of an upstream's trailers: no framing, and nothing that a head may not say."""
    return [pair for pair in trailers if _role_to_client(pair[0].lower()) == _PASSES]


def declare_length(headers: RawHeaders, body_bytes: int) -> None:
    """Have fields, whose names are in lower case, tell of a body of this length where they tell of any."""
    for index, (name, _) in enumerate(headers):
        if name == b"content-length":
            headers[index] = (name, b"%d" % body_bytes)


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
    ]
    names = [value for name, value in request_headers if name == b"access-control-request-headers"]
    if names:
        allowed.append((b"access-control-allow-headers", b", ".join(names)))
    if asked.get(b"access-control-request-private-network") == b"true":
        # A page on the open web that talks to a proxy on the user's own machine or network.
        allowed.append((b"access-control-allow-private-network", b"true"))
    return allowed


def is_preflight(headers: RawHeaders) -> bool:
    """Return whether an OPTIONS request is a CORS preflight."""
    names = {name for name, _ in headers}
    return b"origin" in names and b"access-control-request-method" in names


def authorization_of(headers: RawHeaders) -> bytes:
    return dict(headers).get(b"authorization", b"")  # quicker than to look at each; a second one is refused


def bearer_key(headers: RawHeaders) -> bytes:
    """Return the API key of `Authorization: Bearer`, or of the browser's WebSocket subprotocol, or b"".

    A tab counts as a blank: an upstream may take it for one, and a blocked key must not hide behind it.
    """
    authorization = authorization_of(headers)
    if authorization[:6].lower() == b"bearer" and authorization[6:7] in (b" ", b"\t"):
        return authorization[7:].strip()
    for name, value in headers:
        if name == b"sec-websocket-protocol":
            for part in value.split(b","):
                if part.strip().startswith(b"openai-insecure-api-key."):
                    return part.strip()[24:]
    return b""


def api_key_of(headers: RawHeaders) -> bytes:
    """Return the API key in whatever form some upstream takes it, or b"": a blocked one must not hide behind another.

    After those of `bearer_key`: the password of `Authorization: Basic`, as OpenAI takes it from browsers; a key without
    a scheme, as one-api does; `api-key` (Azure), `x-api-key` (Anthropic).
    """
    if api_key := bearer_key(headers):
        return api_key
    scheme, _, credentials = authorization_of(headers).replace(b"\t", b" ").partition(b" ")
    if scheme.lower() == b"basic":
        user, _, password = _unpacked(credentials.strip()).partition(b":")
        return password or user
    if scheme and not credentials.strip():
        return scheme
    given = dict(headers)
    return (given.get(b"api-key") or given.get(b"x-api-key") or b"").strip()


def _unpacked(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials + b"==")
    except ValueError:
        return b""
