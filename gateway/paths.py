"""Which request paths are /v1, beyond doubt: proxies, Django and upstreams do not all normalise alike."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from gateway.endpoints import ROUTE_PATHS
from gateway.errors import PathRefusedError

# Nearly every real path: nothing in it that normalisation could change.
_PLAIN = re.compile(rb"/v1(?:/[A-Za-z0-9_:~-][A-Za-z0-9_:.~-]*)*/?")
_SUSPICIOUS = re.compile(rb"[%\\;\x80-\xff]|/\.|//")
# What some readers take for a dot or a slash, or leave out: control bytes, overlong UTF-8 (RFC 3629 §10), escapes of
# IIS's own, and dot segments with blanks about them.
_TRICKS = re.compile(
    rb"[\x00-\x1f\x7f]"
    rb"|(?:\xc0|\xe0\x80|\xf0\x80\x80)[\xae\xaf]|(?:\xc1|\xe0\x81|\xf0\x80\x81)\x9c"
    rb"|(?i:%u00(?:2e|2f|5c))"
    rb"|[/\\](?: +\.\.? *|\.\.? +)(?:[/\\;]|\Z)"
)
_MOST_DECODINGS = 4


def is_plainly_gateway_path(raw_path: bytes) -> bool:
    """Return whether a path is /v1 or below and every reading of it is as good as another; most are."""
    return raw_path in ROUTE_PATHS or _PLAIN.fullmatch(raw_path) is not None


def is_gateway_path(raw_path: bytes) -> bool:
    """Return whether a path, as it stood on the wire, is /v1 or below.

    Raises PathRefusedError where the answer depends on who normalises: dot segments that leave /v1,
    `%2e`, `%2f`, doubled slashes, backslashes and path parameters that make another path a /v1 path, and
    whatever only careless readers take for a dot segment.
    A path that stays below /v1 by every reading is one, and is passed on exactly as sent.
    """
    if is_plainly_gateway_path(raw_path):
        return True
    is_ours = raw_path == b"/v1" or raw_path.startswith(b"/v1/")
    if not _SUSPICIOUS.search(raw_path):
        return is_ours
    decodings = _decodings(raw_path)
    if {_leads_to_v1(path) for path in decodings} != {is_ours} or (is_ours and any(map(_TRICKS.search, decodings))):
        raise PathRefusedError("The path is ambiguous: it is not below /v1 once it has been normalised.")
    return is_ours


def _decodings(path: bytes) -> list[bytes]:
    found = [path]
    while (decoded := unquote_to_bytes(found[-1])) != found[-1]:
        if len(found) > _MOST_DECODINGS:
            raise PathRefusedError("The path is percent-encoded too many times.")
        found.append(decoded)
    return found


def _leads_to_v1(path: bytes) -> bool | None:
    """Return whether the path is below /v1 once resolved; None if it climbs above where it started."""
    resolved: list[bytes] = []
    for segment in path.replace(b"\\", b"/").split(b"/"):
        name = segment.split(b";", 1)[0]
        if name == b"..":
            if len(resolved) <= 1:
                return None
            resolved.pop()
        elif name not in (b"", b"."):
            resolved.append(name)
    return bool(resolved) and resolved[0] == b"v1"
