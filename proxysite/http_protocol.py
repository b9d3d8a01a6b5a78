"""One client's connection: uvicorn's protocol, with the bounds and the strictness that it leaves out.

uvicorn's own bounds neither the bytes nor the time of a request's head, cannot end a response visibly cut, answers
HTTP/1.0 in chunks, refuses a 304 with a length, and knows no methods but llhttp's.
"""

from __future__ import annotations

import contextlib
import http
import logging
import math
import re
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.asgi import Memory
from gateway.errors import BadRequestError, GatewayError, HeadersTooLargeError, error_body
from gateway.headers import Plan, plan_of
from proxysite import settings
from proxysite.departures import WatchedFlow
from proxysite.http_exchange import Exchange

logger = logging.getLogger("proxysite.server")

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://[^/?#]*(/[^#]*)")
_LONGEST_METHOD = 64
# A field of a few bytes costs twenty times as much in memory; browsers and SDKs send some twenty.
_MOST_FIELDS = 256
# Requests behind one that is not answered yet: who sends more at once gets none of them answered.
_MOST_WAITING = 16
_STAND_IN_METHOD = b"POST"
_LINGER_SECONDS = 30.0
_DRAIN_SECONDS = 1.0


class HTTPProtocol(HttpToolsProtocol):
    """Reads requests, runs one exchange after the other; `sweep`, called now and then, ends what is overdue."""

    cycle: Exchange | None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draining = False
        self._asgi = {"version": self.asgi_version, "spec_version": "2.3"}
        # When this connection is to be closed, on the loop's clock: a number that is moved costs nothing where
        # a timer for each request would.
        self._deadline = math.inf
        self._memory = Memory()
        self._is_idle = True
        self._in_head = False
        # Since the connection was idle, or since the last byte of a body: of a head, or of trailers.
        self._head_bytes = 0
        self._refused = False
        self._running: Exchange | None = None
        self._due: Exchange | None = None  # to be run once what has arrived is read
        self._method: bytes | None = None
        self._method_bytes = b""
        self._unknown_method_begun = False
        self._messages_in_feed = 0

    # The connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = self._flow = WatchedFlow(transport)
        self._deadline = self.loop.time() + settings.HEADER_TIMEOUT_SECONDS
        self._is_idle = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        self._flow.forget()
        self._deadline = math.inf
        for waiting, _ in self.pipeline:
            waiting.disconnected = True
        self.pipeline.clear()
        for exchange in (self._running, self.cycle):
            if exchange is not None and not exchange.response_complete:
                exchange.disconnect()
        self.flow.resume_writing()
        self.transport.close()
        self.parser = None  # type: ignore[assignment]

    def sweep(self, now: float) -> None:
        """Close the connection if its time is up: to send a head, to be idle, or to read a last answer."""
        if now > self._deadline and not self.transport.is_closing():
            self.transport.close()

    def shutdown(self) -> None:
        """Let a running response end, and a request that is already on its way be answered; then close."""
        self.draining = True
        if self.cycle is None or self.cycle.response_complete:
            self._deadline = min(self._deadline, self.loop.time() + _DRAIN_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._is_idle:
            self._is_idle = False
            self._deadline = self.loop.time() + settings.HEADER_TIMEOUT_SECONDS
        self._head_bytes += len(data)
        if self._unknown_method_begun:
            self._unknown_method_begun = False
            self._feed_unknown_method(self._method_bytes + data)
        else:
            self._feed(data)
        if self._in_head and not self._refused:
            if self.url:
                self._method_bytes = b""
            elif not self._unknown_method_begun:
                # So far only part of a method: kept, in case it is one that llhttp does not know.
                self._method_bytes = (self._method_bytes + data)[: _LONGEST_METHOD + 8]
            self._check_head(self._head_bytes)
        elif self._head_bytes > settings.MAX_HEADER_BYTES and not self._refused and self._has_more_body():
            # No byte of it for so long: a chunk's extension, or a trailer, of which httptools keeps all.
            self._check_head(self._head_bytes)

    def _has_more_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _feed(self, data: bytes) -> None:
        between_messages = self.cycle is None or not self.cycle.more_body
        self._messages_in_feed = 0
        try:
            self.parser.feed_data(data)
            due, self._due = self._due, None
            if due is not None and not self._refused:
                self._run(due)  # only now, that what has come of its body can be seen
        except httptools.HttpParserInvalidMethodError as exc:
            if between_messages and self._messages_in_feed <= 1:
                self._feed_unknown_method(self._method_bytes + data)
            else:
                self._invalid(exc)
        except httptools.HttpParserUpgrade as exc:
            self._upgrade(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            self._invalid(exc)

    def _feed_unknown_method(self, data: bytes) -> None:
        """Read a request whose method llhttp does not know, under the name of one that it knows.

        `data` begins with the method: nothing of an earlier request may be read a second time.
        """
        self._method_bytes = b""
        method, blank, rest = data.lstrip(b"\r\n").partition(b" ")
        if len(method) > _LONGEST_METHOD or not _TOKEN.fullmatch(method):
            self.refuse(BadRequestError("This is not a valid HTTP/1.1 request."))
            return
        self.parser = httptools.HttpRequestParser(self)
        if not blank:
            self._method_bytes = data
            self._unknown_method_begun = True
            return
        self._method = method
        self._feed(_STAND_IN_METHOD + b" " + rest)

    def _invalid(self, exc: Exception) -> None:
        logger.debug("refused: %s", exc)
        self.refuse(BadRequestError("This is not a valid HTTP/1.1 request."))

    def _upgrade(self, rest: bytes) -> None:
        if self._refused:
            return
        version = self.parser.get_http_version()
        # Of HTTP/1.0 an upgrade is to be ignored (RFC 9110 §7.8).
        if version == "1.1" and self._should_upgrade() and self.scope["method"] == "GET":
            if self.cycle is not None and not self.cycle.response_complete:
                self.refuse(BadRequestError("A WebSocket handshake cannot follow an unanswered request."))
                return
            self._deadline = math.inf
            self.handle_websocket_upgrade()
            if rest:
                self.transport.get_protocol().data_received(rest)  # type: ignore[attr-defined]
            return
        # An upgrade that is not taken (h2c, from clients that always offer it) is an ordinary request.
        head = [_STAND_IN_METHOD, b" ", self.url, b" HTTP/%b\r\n" % version.encode()]
        head += [b"%b: %b\r\n" % pair for pair in _without_upgrade(self.headers)]
        self._method = self.scope["method"].encode("ascii")
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join(head) + b"\r\n" + rest)

    def _get_upgrade(self) -> bytes | None:
        # uvicorn's looks at the last Connection field only.
        tokens = {part.strip().lower() for n, v in self.headers if n == b"connection" for part in v.split(b",")}
        asked = [value.lower() for name, value in self.headers if name == b"upgrade"]
        return asked[-1] if asked and b"upgrade" in tokens else None

    def refuse(self, error: GatewayError) -> None:
        """Answer with an error of the server's own and close; nothing more is read from this connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        exchange = self._running
        if exchange is not None and not exchange.response_complete:
            exchange.disconnect()
            # Nor can an answer overtake that to an earlier request.
            if exchange.response_started or exchange is not self.cycle:
                self.transport.abort()
                return
        elif self.pipeline:
            self.transport.abort()
            return
        body = error_body(error)
        head = (
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
            "content-type: application/json; charset=utf-8\r\naccess-control-allow-origin: *\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self._linger()

    def _linger(self) -> None:
        """Close once the client has read the answer: closing on unread bytes would reset the connection."""
        self._refused = True
        self.headers = []
        self.scope = {}  # type: ignore[typeddict-item]
        with contextlib.suppress(OSError, RuntimeError):  # the client may have left already
            self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.time() + _LINGER_SECONDS

    # A request's head

    def _check_head(self, head_bytes: int) -> bool:
        """Refuse a head, or trailers, that are too large; return whether they were."""
        if head_bytes > settings.MAX_HEADER_BYTES:
            self.refuse(HeadersTooLargeError(f"The request's header fields exceed {settings.MAX_HEADER_BYTES} bytes."))
        elif len(self.headers) > _MOST_FIELDS:
            self.refuse(HeadersTooLargeError(f"The request has more than {_MOST_FIELDS} header fields."))
        else:
            return False
        return True

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._messages_in_feed += 1
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer, which nothing behind this server could be told of
            # RFC 9110 §5.5: blanks behind a value are no part of it, and llhttp keeps them.
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self._in_head = False
        fed_bytes, self._head_bytes = self._head_bytes, 0
        method = self._method or self.parser.get_method()
        self._method = None
        if self._refused:
            return
        if fed_bytes > settings.MAX_HEADER_BYTES or len(self.headers) > _MOST_FIELDS:
            # What was fed may hold more than the head.
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if self._check_head(head_bytes):
                return
        if method == b"CONNECT":
            self.refuse(BadRequestError("This is no tunnel to other hosts."))
            return
        try:
            self.scope = self._scope_of(method)  # type: ignore[assignment]
        except BadRequestError as error:
            self.refuse(error)
            return
        if self.parser.should_upgrade():
            return  # llhttp raises HttpParserUpgrade next
        self._deadline = math.inf
        self._start_exchange()

    def _scope_of(self, method: bytes) -> dict[str, Any]:
        """Return the ASGI scope: `target` is path and query as they stood on the wire, `plan` that of the headers,
        `memory` this connection's.

        Raises BadRequestError.
        """
        version = self.parser.get_http_version()
        plan = plan_of(self.headers)
        if not plan.is_usual or version != "1.1":
            self._check_fields(plan, version)
        url = self.url
        if url[:1] != b"/":
            # Absolute form (RFC 9112 §3.2.2) says what `Host` says: where to is settled here, not by clients.
            parts = _ABSOLUTE_FORM.fullmatch(url)
            if parts is None:
                raise BadRequestError("The request target is not a path.")
            url = parts[1]
        if url.find(b"#") >= 0:
            raise BadRequestError("A request target has no fragment.")
        path, _, query = url.partition(b"?")
        return {
            "type": "http",
            "asgi": self._asgi,
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": method.decode("ascii"),
            "root_path": "",
            "raw_path": path,
            "query_string": query,
            "target": url,
            "headers": self.headers,
            "plan": plan,
            "state": self.app_state,
            "memory": self._memory,
        }

    def _check_fields(self, plan: Plan, version: str) -> None:
        """Settle what fields say to this server. Raises BadRequestError."""
        headers = self.headers
        if version not in ("1.1", "1.0"):
            raise BadRequestError(f"HTTP/{version} is not spoken here.")
        if b"transfer-encoding" in plan.at:
            codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
            if codings != [b"chunked"] or version == "1.0":
                raise BadRequestError("The only transfer coding is chunked, over HTTP/1.1.")
        if b"expect" in plan.at and version == "1.1":
            # RFC 9110 §10.1.1: of HTTP/1.0 it is ignored, whose clients know no interim answers.
            self.expect_100_continue = (b"expect", b"100-continue") in [(n, v.lower()) for n, v in headers]
        if plan.hosts != 1 and version == "1.1":
            raise BadRequestError("An HTTP/1.1 request has exactly one Host field.")

    # Exchanges

    def _start_exchange(self) -> None:
        previous = self.cycle
        exchange = Exchange(
            self,
            self.scope,  # type: ignore[arg-type]
            expects_continue=self.expect_100_continue,
            keep_alive=self.scope["http_version"] == "1.1" and self.parser.should_keep_alive(),
        )
        self.cycle = exchange
        if previous is None or previous.response_complete:
            self._due = exchange
        elif len(self.pipeline) < _MOST_WAITING:
            # Read on all the same: else nobody would see the client leave.
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
        else:
            self._refused = True
            self.transport.abort()

    def _run(self, exchange: Exchange) -> None:
        self._running = exchange
        # As uvicorn's tasks: all that it does with those is to count them, and to cancel them in the end.
        self.tasks.add(exchange)  # type: ignore[arg-type]
        application: Any = self.app(exchange.scope, exchange.receive, exchange.send)
        if application is not None:
            exchange.start(application)

    def _run_next(self) -> None:
        if self.pipeline and not self._refused and not self.transport.is_closing():
            waiting: Any = self.pipeline.pop()[0]
            self._run(waiting)

    def exchange_ended(self, exchange: Exchange) -> None:
        """Forget an exchange whose application has returned."""
        self.tasks.discard(exchange)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        exchange = self.cycle
        if exchange is not None and not exchange.response_complete and not self._refused:
            exchange.feed_body(body)

    def on_message_complete(self) -> None:
        exchange = self.cycle
        if exchange is not None and exchange.more_body and not self.parser.should_upgrade():
            exchange.end_body()

    def response_ended(self, exchange: Exchange) -> None:
        """Go on with the connection: the next pipelined request, keep-alive, or the end."""
        if self.transport.is_closing():
            return
        if exchange.more_body:
            self._linger()
        elif not exchange.keep_alive:
            self.transport.close()
        elif self.pipeline:
            # Not in this turn, in which the upstream may be about to close the connection that has just become free.
            self.loop.call_soon(self._run_next)
        else:
            self.flow.resume_reading()
            self._is_idle = True
            self._head_bytes = 0
            idle_s = _DRAIN_SECONDS if self.draining else settings.KEEPALIVE_SECONDS
            self._deadline = self.loop.time() + idle_s


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
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
