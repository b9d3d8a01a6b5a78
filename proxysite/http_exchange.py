"""One HTTP request and its response on a connection: framing, flow control, and ends that look like what they are."""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from gateway.errors import GatewayError, ResponseCutError
from gateway.headers import Roles
from proxysite.logs import current_request_id

if TYPE_CHECKING:
    from proxysite.http_protocol import HTTPProtocol

logger = logging.getLogger("proxysite.server")

_STATUS_LINES: dict[tuple[int, bytes | None], bytes] = {
    (status.value, reason): b"HTTP/1.1 %d %b" % (status.value, status.phrase.encode())
    for status in http.HTTPStatus
    for reason in (None, status.phrase.encode())
}
_PHRASE = re.compile(rb"[\t -~\x80-\xff]*")  # RFC 9112 §4
_PLAIN, _LENGTH, _DATE, _CONNECTION, _CODING = range(5)
_ROLES = {b"content-length": _LENGTH, b"date": _DATE, b"connection": _CONNECTION, b"transfer-encoding": _CODING}
_DISCONNECT = {"type": "http.disconnect"}
_NO_SCOPE: dict[str, Any] = {}
_BUFFERED_BODY_BYTES = 64 * 1024
# Until a closing connection whose peer does not read is dropped, and until one is reset.
_FLUSH_SECONDS = 30.0
_RESET_SECONDS = 0.5


_line = b": ".join
_roles = Roles(lambda name: _ROLES.get(name.lower(), _PLAIN))


class Exchange:
    """What uvicorn calls a cycle: `receive` and `send` of one run of the ASGI application.

    `scope["on_disconnect"]` takes a callback for the moment the client leaves, once the request's body has been
    received: cheaper than a task that awaits `receive`. `scope["shortcuts"]` is this object, as
    `gateway.asgi.Shortcuts`; an application that makes use of it may have no task.
    """

    # Defaults of the class, not of each exchange: most come to their end as they are.
    _task: asyncio.Task[None] | None = None
    _on_shutdown: Callable[[], None] | None = None
    disconnected = False
    more_body = True
    response_started = False
    response_complete = False
    _parts_bytes = 0
    _body_delivered = False
    _waiter: asyncio.Future[None] | None = None
    _on_disconnect: Callable[[], None] | None = None
    _head = b""
    _has_body = True
    _chunked = False
    _bytes_left = -1
    _trailers_follow = False

    def __init__(self, protocol: HTTPProtocol, scope: dict[str, Any], *, expects_continue: bool, keep_alive: bool):
        self.protocol = protocol
        self.scope = scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.keep_alive = keep_alive
        self._expects_continue = expects_continue
        self._parts: list[bytes] = []
        scope["on_disconnect"] = self.on_disconnect
        scope["shortcuts"] = self

    # From the connection

    def feed_body(self, part: bytes) -> None:
        self._parts.append(part)
        self._parts_bytes += len(part)
        if self._parts_bytes > _BUFFERED_BODY_BYTES:
            self.flow.pause_reading()
        self._wake()

    def end_body(self) -> None:
        self.more_body = False
        self._wake()

    def behind_body(self, data: bytes) -> bytes | None:
        """Return what stands behind this request in `data`, the read in which its body has ended; None if unknown."""
        plan = self.scope.get("plan")
        # Between the last chunk and the end of a chunked body there may be anything.
        if self.more_body or not self._parts or plan is None or b"content-length" not in plan.at:
            return None
        return data[len(self._parts[-1]) :]

    def disconnect(self) -> None:
        """The client has left, or is not to be spoken to any more."""
        if self.disconnected:
            return
        self.disconnected = True
        self._wake()
        if self._on_disconnect is not None and not self.response_complete:
            self._on_disconnect()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # From the server

    def cancel(self, msg: str = "") -> None:
        """End what still runs; as a task's."""
        if self._on_shutdown is not None:
            self._on_shutdown()
        elif self._task is not None:
            self._task.cancel(msg)

    # To the application

    def on_shutdown(self, callback: Callable[[], None]) -> None:
        self._on_shutdown = callback

    def start(self, application: Awaitable[None]) -> None:
        # Not loop.create_task: it lets the class number the task's name, for nobody to read.
        self._task = asyncio.Task(self._run(application), loop=self.protocol.loop, name="request")

    def end(self) -> None:
        self.protocol.exchange_ended(self)
        # They lead back here: a cycle for the garbage collector, with every request.
        self._task = self._on_disconnect = self._on_shutdown = None
        self.scope = _NO_SCOPE

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        self._on_disconnect = callback
        self.flow.resume_reading()  # a connection that is not read from cannot be seen to end
        if self.disconnected:
            callback()

    def whole_body(self) -> bytes | None:
        if self.more_body or self._body_delivered or self._expects_continue or self.disconnected:
            return None
        self._body_delivered = True
        parts = self._parts
        self._parts_bytes = 0
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return body

    async def receive(self) -> dict[str, Any]:
        if self._expects_continue:
            self._expects_continue = False
            if not self.response_started and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.disconnected or self.response_complete):
            if self._parts or not (self.more_body or self._body_delivered):
                self._body_delivered = not self.more_body
                body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                self._parts_bytes = 0
                return {"type": "http.request", "body": body, "more_body": self.more_body}
            self.flow.resume_reading()
            self._waiter = self.protocol.loop.create_future()
            await self._waiter
        return _DISCONNECT

    async def send(self, message: dict[str, Any]) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.body" and self.response_started and not self.response_complete:
            self._continue(message.get("body", b""), message.get("more_body", False))
        elif kind == "http.response.start" and not self.response_started:
            self._start(message)
        elif kind == "http.response.trailers" and self.response_complete:
            return  # its framing has no place for them
        elif kind == "http.response.trailers" and self._trailers_follow:
            lines = [b"%b: %b\r\n" % pair for pair in message.get("headers", ())]
            self._end(b"0\r\n" + b"".join(lines) + b"\r\n")
        else:
            raise RuntimeError(f"ASGI message {kind!r} out of order")

    def has_left(self) -> bool:
        return self.disconnected

    def is_clogged(self) -> bool:
        return self.flow.write_paused

    def send_interim(self, status: int, reason: bytes | None, headers: list[tuple[bytes, bytes]]) -> None:
        # RFC 9110 §15.2: never to a client of HTTP/1.0. Nobody needs them, so they wait for nobody.
        if self.disconnected or self.response_started or self.flow.write_paused:
            return
        if self.scope["http_version"] == "1.1":
            line = _STATUS_LINES.get((status, reason)) or status_line(status, reason)
            self.transport.write(checked_head([line, *map(_line, headers)]))

    def send_part(self, part: bytes) -> None:
        if not self.disconnected:
            self._continue(part, True)

    def respond(
        self,
        status: int,
        reason: bytes | None,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        *,
        body_bytes: int,
        has_date: bool,
    ) -> None:
        if self.disconnected:
            return
        self.response_started = True
        protocol = self.protocol
        lines = [_STATUS_LINES.get((status, reason)) or status_line(status, reason), *map(_line, headers)]
        if not has_date:
            lines += map(_line, protocol.server_state.default_headers)
        if body_bytes < 0:
            if self.scope["http_version"] == "1.1":
                lines.append(b"transfer-encoding: chunked")
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
            else:
                self.keep_alive = False
        elif body_bytes != len(body):
            raise RuntimeError("the response body is not as long as its Content-Length")
        if protocol.draining or self.more_body:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close")
        self.transport.write(checked_head(lines) + body)
        self.response_complete = True
        self._wake()
        protocol.response_ended(self)

    def _start(self, message: dict[str, Any]) -> None:
        self.response_started = True
        status, reason = message["status"], message.get("reason")
        lines = [_STATUS_LINES.get((status, reason)) or status_line(status, reason)]
        self._has_body = self.scope["method"] != "HEAD" and status not in (204, 304)
        has_date = has_close = False
        for pair in message.get("headers", ()):
            role = _roles[pair[0]]
            if role != _PLAIN:
                if role == _LENGTH:
                    self._bytes_left = int(pair[1])
                elif role == _DATE:
                    has_date = True
                elif role == _CONNECTION:
                    has_close = pair[1].lower() == b"close"
                else:
                    continue
            lines.append(_line(pair))
        if not has_date:
            lines += map(_line, self.protocol.server_state.default_headers)
        if self._has_body and self._bytes_left < 0:
            if self.scope["http_version"] == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked")
            else:
                self.keep_alive = False
        if has_close or (self.more_body and status >= 400) or self.protocol.draining:
            self.keep_alive = False
        if not self.keep_alive and not has_close:
            lines.append(b"connection: close")
        self._trailers_follow = self._chunked and message.get("trailers", False)
        # Held back until the first body part, which is often there at once: one packet then holds both.
        self._head = checked_head(lines)
        if not message.get("body_follows"):
            self.protocol.loop.call_soon(self._flush_head)

    def _flush_head(self) -> None:
        if self._head and not self.disconnected:
            head, self._head = self._head, b""
            self.transport.write(head)

    def _continue(self, body: bytes, more_body: bool) -> None:
        if not self._has_body:
            body = b""
        elif self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
        elif self._bytes_left >= 0:
            self._bytes_left -= len(body)
            if self._bytes_left < 0:
                raise RuntimeError("the response body is longer than its Content-Length")
        if not more_body and not self._trailers_follow:
            self._end(body + b"0\r\n\r\n" if self._chunked else body)
        elif body:
            if self._head:
                body, self._head = self._head + body, b""
            self.transport.write(body)

    def _end(self, last: bytes) -> None:
        if self._head:
            last, self._head = self._head + last, b""
        if last:
            self.transport.write(last)
        if self._has_body and self._bytes_left > 0:
            raise ResponseCutError("the response body is shorter than its Content-Length")
        self.response_complete = True
        self._wake()
        self.protocol.response_ended(self)

    async def _run(self, application: Awaitable[None]) -> None:
        """Await the application; whatever goes wrong, the client sees a whole response or a cut one."""
        current_request_id.set("")  # whoever has begun this in a callback has another one's
        try:
            await application
            if not (self.response_complete or self.disconnected):
                raise ResponseCutError("the application ended before its response did")
        except (ResponseCutError, asyncio.CancelledError):
            self.cut()
        except Exception:
            # The edge of the process: nobody above could still answer.
            logger.exception("the application failed")
            if self.response_started:
                self.cut()
            else:
                self.protocol.refuse(GatewayError("Internal server error."))
        finally:
            self.end()

    def cut(self) -> None:
        """End the connection so that the client can tell the response from a whole one."""
        self._flush_head()
        if self.disconnected or self.response_complete:
            return
        if self.response_started and self._has_body and (self._chunked or self._bytes_left > 0):
            self.transport.close()  # what was written still goes out; its framing shows the cut
            self.protocol.loop.call_later(_FLUSH_SECONDS, self.transport.abort)
        else:
            # A body that ends with the connection is only cut by a reset. Not at once: a reset overtakes
            # what was written before it.
            self.protocol.loop.call_later(_RESET_SECONDS, _reset, self.transport)


def _reset(transport: asyncio.Transport) -> None:
    if not transport.is_closing():
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def status_line(status: int, reason: bytes | None) -> bytes:
    """Return the line for a phrase of the upstream's own, byte for byte; one that holds what none may is not sent."""
    if reason is None or not _PHRASE.fullmatch(reason):
        return _STATUS_LINES.get((status, None), b"HTTP/1.1 %d " % status)
    return b"HTTP/1.1 %d %b" % (status, reason)


def checked_head(lines: list[bytes]) -> bytes:
    # Neither counted, which looks at byte by byte, nor `in`, which for bytes raises an error and drops it again.
    find = b"".join(lines).find
    if find(b"\n") >= 0 or find(b"\r") >= 0 or find(b"\0") >= 0:
        raise RuntimeError("a response header field holds a line break")
    lines += (b"", b"")
    return b"\r\n".join(lines)
