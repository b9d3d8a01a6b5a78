"""One request as it goes over the wire: its head, how its body is framed, and the sending of a long one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import Any

import httpx2 as httpx

from gateway.answer import Answer, Fields, Interim
from gateway.connection import Connection

CHUNKED = -1
# RFC 9110 §9.2.2: what may be sent a second time without being asked to.
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
# Bodies up to this go out in one write with their head.
JOINED_BYTES = 65_536

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2
_PLAIN, _LENGTH, _CODING = range(3)
_FRAMING_NAMES = {b"content-length": _LENGTH, b"transfer-encoding": _CODING}
# Bounded, or a client that invents names would fill the memory.
_MAX_KNOWN = 1024
_known_names: dict[bytes, int] = {}
_known_methods: dict[str, bytes] = {}
_NO_LIMITS: dict[str, float | None] = {}


class OutgoingRequest(httpx.Request):
    """A request made of parts that are ready: nothing is added to them, and `Headers` is built when somebody looks.

    httpx's own constructor copies the URL, upper-cases the method (which is case-sensitive, RFC 9110 §9.1) and takes
    the fields apart. `extensions["raw_headers"]` are the fields as they go out; `length` is what they announce, bytes
    or `CHUNKED`: their names and framing are the caller's to have checked, or None: then `assemble` does.
    `extensions["on_sent"]` is called, where the transport knows of it, once the request is on its way: work that the
    upstream need not wait for. It must not raise.

    Our own transport sends it, by `assemble` and `send_on`; an idempotent one may go out twice, any other lets go of
    its body when it does. `answer` is there once it was sent. Our own also calls `on_interim` with each interim answer.
    """

    connection: Connection | None = None  # that it was sent on
    answer: Answer
    on_interim: Callable[[Interim], None] | None = None

    _head = b""
    _rest = b""
    _upload: Upload | None = None

    def __init__(
        self,
        method: str,
        url: httpx.URL,
        *,
        fields: Fields,
        length: int | None,
        body: bytes | httpx.AsyncByteStream,
        target: bytes,
        timeout: dict[str, float | None],
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        self.method = method
        self.url = url
        self.fields = fields
        self.length = length
        self.body = body
        self.target = target
        self.timeout = timeout
        self.on_sent = on_sent

    @classmethod
    def of(cls, request: httpx.Request) -> OutgoingRequest:
        """Return a request of httpx's in this form."""
        extensions = request.extensions
        fields = extensions.get("raw_headers")
        body: Any = request.stream
        return cls(
            request.method,
            request.url,
            fields=request.headers.raw if fields is None else fields,
            length=None,
            body=b"".join(body) if isinstance(body, httpx.ByteStream) else body,
            target=extensions.get("target") or request.url.raw_path,
            timeout=extensions.get("timeout") or _NO_LIMITS,
            on_sent=extensions.get("on_sent"),
        )

    def assemble(self) -> None:
        """Make it ready for the wire. Raises httpx.LocalProtocolError."""
        head, length = request_head(self.method, self.target, self.fields, length=self.length)
        body = self.body
        if isinstance(body, bytes):
            body = framed(body, length)
            if len(body) <= JOINED_BYTES:
                head += body
            else:
                self._rest = body
        elif isinstance(body, AsyncIterable):
            self._upload = Upload(body, length=length, write_timeout_s=self.timeout.get("write"))
        else:
            raise httpx.LocalProtocolError("a request stream that is not async")
        self._head = head

    @property
    def repeatable(self) -> bool:
        return self._upload is None and self.method in IDEMPOTENT

    def send_on(self, connection: Connection) -> None:
        timeout = self.timeout
        self.answer = connection.ask(
            self._head,
            self._rest,
            bodyless=self.method == "HEAD",
            read_timeout_s=timeout.get("read"),
            write_timeout_s=timeout.get("write"),
        )
        self.connection = connection
        if self.method not in IDEMPOTENT:
            # It goes out once: what it holds need not wait for the answer's end.
            self.body = self._head = self._rest = b""
        if self._upload is not None:
            connection.upload(self._upload.run(connection))

    async def abandon(self) -> None:
        """Drop what nobody waits for any more."""
        if self.connection is not None:
            await self.answer.aclose()

    def say_sent(self) -> None:
        """Tell whoever asked, once."""
        on_sent, self.on_sent = self.on_sent, None
        if on_sent is not None:
            on_sent()

    # What httpx's class has as attributes is made here when somebody looks.

    @property
    def extensions(self) -> dict[str, Any]:  # type: ignore[override]
        return {
            "target": self.target,
            "timeout": self.timeout,
            "raw_headers": self.fields,
            "on_sent": self.on_sent,
        }

    @property
    def stream(self) -> httpx.AsyncByteStream:  # type: ignore[override]
        return httpx.ByteStream(self.body) if isinstance(self.body, bytes) else self.body

    @property
    def headers(self) -> httpx.Headers:  # type: ignore[override]
        return httpx.Headers(self.fields)


def request_head(method: str, target: bytes, fields: Fields, *, length: int | None = None) -> tuple[bytes, int]:
    """Assemble a request's head, every byte as given; return it and the length of the body, or `CHUNKED`.

    With `length`, names and framing of the fields are known to be right. Errors: `httpx.LocalProtocolError` where a
    part would end up as something else: CR, LF or NUL anywhere, a space in the target, a method or a field name that
    is no token, CONNECT (its answer is no message), a body announced twice or in other words than a number or
    `chunked`.
    """
    verb = _known_methods.get(method) or _checked_method(method)
    if length is None:
        length = _length_announced(fields)
    lines = [b" ".join((verb, target, b"HTTP/1.1")), *map(b": ".join, fields), b"", b""]
    # Neither counted, which looks at byte by byte, nor `in`, which for bytes raises an error and drops it again.
    find = b"".join(lines).find
    if find(b"\n") >= 0 or find(b"\r") >= 0 or find(b"\0") >= 0:
        raise httpx.LocalProtocolError("CR, LF or NUL inside a request's head")
    if not target or target.find(b" ") >= 0:
        raise httpx.LocalProtocolError("a request target is one word")
    return b"\r\n".join(lines), length


def framed(body: bytes, length: int) -> bytes:
    """Return a whole body as it goes over the wire. Errors: as `Upload.run`."""
    if length == CHUNKED:
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    if length != len(body):
        raise httpx.LocalProtocolError(f"a body of {len(body)} bytes where {length} were announced")
    return body


class Upload:
    """Sends a body from a stream, no faster than the upstream takes it."""

    def __init__(self, stream: AsyncIterable[bytes], *, length: int, write_timeout_s: float | None) -> None:
        self._stream = stream
        self._length = length
        self._write_timeout_s = write_timeout_s

    async def run(self, connection: Connection) -> None:
        """Send to the end and report to the connection: None, or what went wrong.

        That is whatever the stream raised, or `httpx.LocalProtocolError` when it is longer or shorter than
        announced.
        """
        parts = aiter(self._stream)
        try:
            await self._send(parts, connection)
        except asyncio.CancelledError:
            connection.fail(httpx.WriteError("the upload was cancelled"))
            raise
        except Exception as exc:
            # Any exception: it is the caller's own, and this hands it to the caller's other task.
            connection.upload_ended(exc)
        else:
            connection.upload_ended()
        finally:
            if isinstance(parts, AsyncGenerator):
                await parts.aclose()

    async def _send(self, parts: AsyncIterable[bytes], connection: Connection) -> None:
        left = self._length
        async for part in parts:
            if left != CHUNKED:
                left -= len(part)
                if left < 0:
                    raise httpx.LocalProtocolError(f"a body longer than the announced {self._length} bytes")
            elif part:
                part = b"%x\r\n%b\r\n" % (len(part), part)
            else:
                continue
            await connection.write(part, timeout_s=self._write_timeout_s)
            del part  # or it would be held until the next one comes
        if left > 0:
            raise httpx.LocalProtocolError(f"a body {left} bytes shorter than announced")
        if left == CHUNKED:
            await connection.write(b"0\r\n\r\n", timeout_s=self._write_timeout_s)


def _length_announced(fields: Fields) -> int:
    length = 0
    framing = None
    for name, value in fields:
        kind = _known_names.get(name)
        if kind is None:
            kind = _checked_name(name)
        if kind:
            if framing is not None:
                raise httpx.LocalProtocolError("a request's body is announced twice")
            framing = name
            length = _announced(kind, value)
    return length


def _checked_method(method: str) -> bytes:
    verb = method.encode("latin-1", "replace")
    if not _TOKEN.fullmatch(verb) or verb == b"CONNECT":
        raise httpx.LocalProtocolError("not a method that can be sent")
    if len(_known_methods) < _MAX_KNOWN and len(verb) < 64:
        _known_methods[method] = verb
    return verb


def _checked_name(name: bytes) -> int:
    if not _TOKEN.fullmatch(name):
        raise httpx.LocalProtocolError("a field name that is no token")
    kind = _FRAMING_NAMES.get(name.lower(), _PLAIN)
    if len(_known_names) < _MAX_KNOWN and len(name) < 64:
        _known_names[name] = kind
    return kind


def _announced(kind: int, value: bytes) -> int:
    value = value.strip(b" \t")
    if kind == _CODING and value.lower() == b"chunked":
        return CHUNKED
    if kind == _LENGTH and value.isdigit() and len(value) < 19:
        return int(value)
    raise httpx.LocalProtocolError("a request's body is announced in an unknown way")
