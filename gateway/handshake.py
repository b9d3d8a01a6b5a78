"""An upstream's answer to a WebSocket handshake: read, and judged."""

from __future__ import annotations

import httptools
from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.utils import accept_key

from gateway.errors import UpstreamProtocolError

Fields = list[tuple[bytes, bytes]]

# Bounds on the answer to a handshake: a refusal's body, and everything with the head.
REFUSAL_BODY_BYTES = 1 << 20
HANDSHAKE_BYTES = REFUSAL_BODY_BYTES + 262_144


class HandshakeAnswer:
    """The answer to a handshake, read by llhttp. Interim answers are skipped."""

    def __init__(self) -> None:
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._received_bytes = 0
        self._status = 0
        self._headers = Headers()
        self._body = bytearray()
        self._has_head = False

    def feed(self, data: bytes) -> bytes:
        """Read more; return what came after a 101. UpstreamProtocolError where it is not HTTP, or too long."""
        self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self.complete = True
            return data[exc.args[0] :]
        except httptools.HttpParserError as exc:
            if not self.complete:
                raise UpstreamProtocolError("The upstream answered with something that is not HTTP.") from exc
        if len(self._body) > REFUSAL_BODY_BYTES or self._received_bytes > HANDSHAKE_BYTES:
            raise UpstreamProtocolError("The upstream refused at too great a length.")
        return b""

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the connection is the end of the answer, too (RFC 9112 §6.3)."""
        return self._has_head and not ("content-length" in self._headers or "transfer-encoding" in self._headers)

    def response(self) -> Response:
        return Response(self._status, "", self._headers, bytes(self._body))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # else: a trailer
            self._headers.set_insecure(name.decode("ascii"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        self._has_head = True
        if not self.complete:
            self._status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        if not self.complete:
            self._body += part

    def on_message_complete(self) -> None:
        if self._status < 200 and self._status != 101:
            self._headers = Headers()
            self._has_head = False
        else:
            self.complete = True


def agreed_subprotocol(response: Response, *, key: str, fields: Fields) -> str | None:
    """Return what a 101 selected of the offered. UpstreamProtocolError where RFC 6455 §4.1 has clients fail."""
    headers = response.headers
    offers = {
        part.strip().decode("latin-1")
        for name, value in fields
        if name == b"sec-websocket-protocol"
        for part in value.split(b",")
    }
    selected = headers.get_all("sec-websocket-protocol")
    is_valid = (
        [value.lower() for value in headers.get_all("upgrade")] == ["websocket"]
        and headers.get_all("sec-websocket-accept") == [accept_key(key)]
        and not headers.get_all("sec-websocket-extensions")
        and len(selected) <= 1
        and offers.issuperset(selected)
    )
    if not is_valid:
        raise UpstreamProtocolError("The upstream's WebSocket handshake is not valid.")
    return selected[0] if selected else None
