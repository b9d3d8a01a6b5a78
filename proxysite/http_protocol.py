"""One client's connection: uvicorn's protocol, with the bounds and the strictness that it leaves out.

uvicorn's own bounds neither the bytes nor the time of a request's head, cannot end a response visibly cut, answers
HTTP/1.0 in chunks, refuses a 304 with a length, and knows no methods but llhttp's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.asgi import Memory
from gateway.errors import BadRequestError, GatewayError, HeadersTooLargeError
from gateway.headers import plan_of
from proxysite import settings
from proxysite.departures import WatchedFlow
from proxysite.http_exchange import Exchange
from proxysite.http_messages import (
    check_fields,
    check_length,
    end_of_messages,
    last_answer,
    length_of,
    offers_websocket,
    only_to_websocket,
    path_and_query,
    stand_in_head,
    stand_in_line,
)

logger = logging.getLogger("proxysite.server")

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LONGEST_METHOD = 1024
# A field of a few bytes costs twenty times as much in memory; browsers and SDKs send some twenty.
_MOST_FIELDS = 256
# Requests behind one that is not answered yet; what is behind them is read when one has been answered.
_MOST_WAITING = 16
# CONNECT, and the methods that llhttp knows of RTSP only: what it has read there is no HTTP, and it does not tell.
_REFUSED_METHODS = frozenset(
    b"CONNECT DESCRIBE ANNOUNCE SETUP PLAY PAUSE TEARDOWN GET_PARAMETER SET_PARAMETER REDIRECT RECORD FLUSH".split()
)
# What most clients send in a packet of its own, right behind the head: with it a request needs no task.
_SMALL_BODY_BYTES = 65_536
_SMALL_BODY_SECONDS = 0.5
_LINGER_SECONDS = 30.0
_DRAIN_SECONDS = 1.0


class _TooManyWaitingError(Exception):
    """Stops the parser: a request has come for which there is no room yet."""


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
        self._due: Exchange | None = None  # to be run once what has arrived is read, or all of a small body has come
        self._due_by = math.inf  # at the latest
        self._stood_in_for: tuple[bytes, bytes] | None = None  # method and target that llhttp was not told
        self._beginning: bytes | None = None  # of the message whose head is being read, where it is known
        self._line_begun = False  # in which something stands that llhttp does not read
        self._messages_in_feed = 0
        self._unread = b""  # behind as many requests as may wait
        self._last_words: GatewayError | None = None  # to be said when all that came before has been answered

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
        if self._due is not None and not self._refused:
            self._due.disconnected = True  # so that nobody is asked for it; its record says that the client has left
            self._run_due()
        for waiting, _ in self.pipeline:
            waiting.disconnected = True
        self.pipeline.clear()
        for exchange in (self._running, self.cycle):
            if exchange is not None and not exchange.response_complete:
                exchange.disconnect()
        self.flow.resume_writing()
        self.transport.close()
        self.parser = None  # type: ignore[assignment]

    def eof_received(self) -> None:
        # The loop would close once all that waits has been read by the client: never, perhaps.
        running = self._running
        if running is not None and not running.response_complete and self.transport.get_write_buffer_size():
            self.transport.abort()

    def sweep(self, now: float) -> None:
        """Close the connection if its time is up: to send a head, to be idle, or to read a last answer.

        A request whose small body is late is run without it.
        """
        if now > self._due_by and not self._refused:
            self._run_due()
        if now > self._deadline and not self.transport.is_closing():
            self.transport.close()

    def shutdown(self) -> None:
        """Let a running response end, and a request that is already on its way be answered; then close."""
        self.draining = True
        if not self._refused:
            self._run_due()  # the server waits for what runs, and cancels it in the end
        if self.cycle is None or self.cycle.response_complete:
            self._deadline = min(self._deadline, self.loop.time() + _DRAIN_SECONDS)

    def data_received(self, data: bytes) -> None:
        if self._refused or self._last_words is not None:
            return
        if self._is_idle:
            self._is_idle = False
            self._deadline = self.loop.time() + settings.HEADER_TIMEOUT_SECONDS
        self._head_bytes += len(data)
        if self._unread:
            self._unread += data
            return
        if self._line_begun:
            self._line_begun = False
            self._feed_stand_in((self._beginning or b"") + data)
        else:
            self._feed(data)
        if self._in_head and not self._refused:
            self._check_head(self._head_bytes)
        elif self._head_bytes > settings.MAX_HEADER_BYTES and not self._refused and self._has_more_body():
            # No byte of it for so long: a chunk's extension, or a trailer, of which httptools keeps all.
            self._check_head(self._head_bytes)

    def _has_more_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body

    def _feed(self, data: bytes) -> None:
        was_in_head = self._in_head
        uploading = self.cycle if self.cycle is not None and self.cycle.more_body else None
        self._messages_in_feed = 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._upgrade(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            self._go_on_behind(exc, self._begun_in(data, uploading, was_in_head=was_in_head))
        else:
            if self._in_head:
                self._beginning = self._begun_in(data, uploading, was_in_head=was_in_head)
        due = self._due
        # Only now, that what has come of its body can be seen.
        if due is not None and not self._refused and not (due.more_body and self._waits_for_body(due)):
            self._run_due()

    def _waits_for_body(self, due: Exchange) -> bool:
        """Return whether the rest of the request is small, and likely to come at once."""
        if self._due_by == math.inf:
            may_wait = not (self.draining or self.expect_100_continue)
            if not (may_wait and 0 < length_of(due.scope["headers"], due.scope["plan"]) <= _SMALL_BODY_BYTES):
                return False
            self._due_by = self.loop.time() + _SMALL_BODY_SECONDS
            due.scope["head_came_s"] = time.perf_counter()
        return True

    def _run_due(self) -> None:
        due, self._due, self._due_by = self._due, None, math.inf
        if due is not None:
            self._run(due)

    def _begun_in(self, data: bytes, uploading: Exchange | None, *, was_in_head: bool) -> bytes | None:
        """Return the bytes of the last message that has begun, from its first on; None if they are not known.

        `data` is what was fed last, and begins between two messages, inside a head, or in the body of `uploading`.
        """
        before = self._messages_in_feed - 1
        if uploading is not None:
            behind = uploading.behind_body(data)
            if behind is None:
                return None
            data = behind
        elif was_in_head:
            if self._beginning is None:
                return None
            data, before = self._beginning + data, before + 1
        return data[end_of_messages(data, before) :] if before > 0 else data

    def _go_on_behind(self, exc: Exception, rest: bytes | None) -> None:
        """Read on where the parser has stopped, if it may: at `rest`, which begins with the message it stopped in."""
        if self._refused:
            return
        if isinstance(exc.__context__, _TooManyWaitingError):
            self._hold(rest)
        elif rest is not None and self._in_head and self._stood_in_for is None and not self.headers:
            self._feed_stand_in(rest)
        else:
            self._invalid(exc)

    def _feed_stand_in(self, data: bytes) -> None:
        """Read a request whose method or target llhttp does not know, under others that it knows.

        `data` begins with the method: nothing of an earlier request may be read a second time.
        """
        self._beginning = None
        line, end, rest = data.lstrip(b"\r\n").partition(b"\n")
        method, _, behind = line.partition(b" ")
        if len(method) > _LONGEST_METHOD or not _TOKEN.fullmatch(method) or method == b"PRI":
            self._refuse_next(BadRequestError("This is not a valid HTTP/1.1 request."))
            return
        self.parser = httptools.HttpRequestParser(self)
        if not end:
            self._beginning = data
            self._line_begun = True
            return
        self._stood_in_for = method, behind.partition(b" ")[0]
        self._in_head = False
        self._feed(stand_in_line(behind) + end + rest)

    def _hold(self, rest: bytes | None) -> None:
        """Leave unread what stands behind as many requests as may wait."""
        self._in_head = False
        self.parser = httptools.HttpRequestParser(self)
        line = b"%b %b " % (self.scope["method"].encode(), self.url)
        if rest is None or not rest.lstrip(b"\r\n").startswith(line):
            # Where it begins is not known, nor what it is called: those before it are answered.
            self._refuse_next(BadRequestError("Too many requests were sent ahead of their answers."))
            return
        self._unread = rest
        self._flow.is_held = True
        self._flow.pause_reading()

    def _read_on(self) -> None:
        """Read what was held, now that there is room for a request."""
        unread, self._unread = self._unread, b""
        self._flow.is_held = False
        self._head_bytes = 0
        self.data_received(unread)
        if not self._unread:
            self._flow.resume_reading()

    def _invalid(self, exc: Exception) -> None:
        logger.debug("refused: %s", exc)
        self._refuse_next(BadRequestError("This is not a valid HTTP/1.1 request."))

    def _upgrade(self, rest: bytes) -> None:
        if self._refused or self._last_words is not None:
            return
        version = self.parser.get_http_version()
        # Of HTTP/1.0 an upgrade is to be ignored (RFC 9110 §7.8).
        if version == "1.1" and self.scope["method"] == "GET" and offers_websocket(self.headers):
            if self.cycle is not None and not self.cycle.response_complete:
                self._refuse_next(BadRequestError("A WebSocket handshake cannot follow an unanswered request."))
                return
            if not self.url.isascii():
                self.refuse(BadRequestError("The target of a WebSocket handshake is in ASCII."))
                return
            self._deadline = math.inf
            self.url = self.scope["target"]  # type: ignore[typeddict-item]
            self.scope["headers"] = only_to_websocket(self.headers)
            self.handle_websocket_upgrade()
            if rest:
                self.transport.get_protocol().data_received(rest)  # type: ignore[attr-defined]
            return
        # An upgrade that is not taken (h2c, from clients that always offer it) is an ordinary request.
        self._stood_in_for = self.scope["method"].encode("ascii"), self.url
        self.parser = httptools.HttpRequestParser(self)
        self._feed(stand_in_head(self.url, version, self.headers) + rest)

    def _refuse_next(self, error: GatewayError) -> None:
        """Refuse the message being read; whole ones before it are answered first, and nothing more is read."""
        earlier = self.cycle
        if earlier is None or earlier.response_complete or earlier.more_body:
            self.refuse(error)
        elif not self._refused:
            self._last_words = error
            self._in_head = False

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
        self.transport.write(last_answer(error))
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
            said = f"The request's header fields exceed {settings.MAX_HEADER_BYTES} bytes."
            self._refuse_next(HeadersTooLargeError(said))
        elif len(self.headers) > _MOST_FIELDS:
            self._refuse_next(HeadersTooLargeError(f"The request has more than {_MOST_FIELDS} header fields."))
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
        if self._stood_in_for is None:
            method = self.parser.get_method()
        else:
            (method, self.url), self._stood_in_for = self._stood_in_for, None
        if self._refused or self._last_words is not None:
            return
        if fed_bytes > settings.MAX_HEADER_BYTES or len(self.headers) > _MOST_FIELDS:
            # What was fed may hold more than the head.
            head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if self._check_head(head_bytes):
                return
        if method in _REFUSED_METHODS and method in (b"CONNECT", self.parser.get_method()):
            self._refuse_next(BadRequestError("This is no tunnel to other hosts, and speaks no RTSP."))
            return
        try:
            self.scope = self._scope_of(method)  # type: ignore[assignment]
        except BadRequestError as error:
            self._refuse_next(error)
            return
        if self.parser.should_upgrade():
            return  # llhttp raises HttpParserUpgrade next
        self._deadline = math.inf
        self._start_exchange()

    def _scope_of(self, method: bytes) -> dict[str, Any]:
        """Return the ASGI scope: `target` is path and query as they stood on the wire, `plan` that of the headers,
        `memory` this connection's; `head_came_s`, of `time.perf_counter`, is added where the body was waited for.

        Raises BadRequestError.
        """
        version = self.parser.get_http_version()
        plan = plan_of(self.headers)
        if not plan.is_usual or version != "1.1":
            self.expect_100_continue = check_fields(self.headers, plan, version)
        check_length(self.headers, plan)
        url = path_and_query(self.url)
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

    # Exchanges

    def _start_exchange(self) -> None:
        previous = self.cycle
        if len(self.pipeline) >= _MOST_WAITING:
            raise _TooManyWaitingError
        exchange = Exchange(
            self,
            self.scope,  # type: ignore[arg-type]
            expects_continue=self.expect_100_continue,
            keep_alive=self.scope["http_version"] == "1.1" and self.parser.should_keep_alive(),
        )
        self.cycle = exchange
        if previous is None or previous.response_complete:
            self._due = exchange
        else:
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

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
            if self._unread:
                self._read_on()

    def exchange_ended(self, exchange: Exchange) -> None:
        """Forget an exchange whose application has returned."""
        self.tasks.discard(exchange)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        exchange = self.cycle
        if exchange is not None and exchange.more_body and not exchange.response_complete and not self._refused:
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
        elif self._last_words is not None:
            self.refuse(self._last_words)
        else:
            self.flow.resume_reading()
            self._is_idle = True
            self._head_bytes = 0
            idle_s = _DRAIN_SECONDS if self.draining else settings.KEEPALIVE_SECONDS
            self._deadline = self.loop.time() + idle_s
