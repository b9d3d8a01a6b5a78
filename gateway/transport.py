"""Our httpx transport: HTTP/1.1 on httptools, with a keep-alive pool. The bytes are the caller's, both ways.

What goes up is the request's raw headers in their order, the target from `extensions["target"]` or the URL,
and the body as the headers frame it; what comes down is not decoded. `extensions["on_sent"]` is called once the
request is on its way. The response's `extensions` also hold `raw_headers`, the header fields as a list of byte pairs,
at no cost; `response.headers` is built on first use. Interim answers (RFC 9110 §15.2) go to an `OutgoingRequest`'s
`on_interim`; httpx's own transport drops them.
"""

from __future__ import annotations

import asyncio
import ssl

import httpx2 as httpx

from gateway.answer import Answer
from gateway.connect import open_socket, tls_context
from gateway.connection import Connection, Origin
from gateway.outgoing import OutgoingRequest
from gateway.tls import ReadBuffer, attach

__all__ = ["PooledTransport", "tls_context"]

_DEFAULT_PORTS = {"http": 80, "https": 443}


class PooledTransport(httpx.AsyncBaseTransport):
    """For one event loop. Opens as many connections as are asked for at once; keeps `max_idle` of them.

    `extensions["timeout"]` is honoured as httpx does: connect (covers proxy and TLS), read and write, each in
    seconds or None; pool never runs out. Errors are httpx's. A response must be read to its end or closed.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        proxy_url: str | None = None,
        max_idle: int = 512,
        idle_timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self._ssl_context = ssl_context
        self._proxy_url = proxy_url
        self._max_idle = max_idle
        self._idle_timeout_s = idle_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._buffer = ReadBuffer()
        # Of the same URL, told by its being the same object: httpx takes 2 µs to say.
        self._last_origin: tuple[httpx.URL | None, Origin] = (None, ("", "", 0))
        self.opened = 0
        self._connections: set[Connection] = set()
        self._idle: dict[Origin, list[Connection]] = {}
        self._idle_count = 0
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        outgoing = request if isinstance(request, OutgoingRequest) else OutgoingRequest.of(request)
        self.begin(outgoing)
        return await self.complete(outgoing)

    def begin(self, request: OutgoingRequest) -> bool:
        """Send a request at once if a connection for it is idle, and return whether one was.

        Raises httpx.LocalProtocolError.
        """
        request.assemble()
        connection = self._take_idle(self._origin_of(request.url))
        if connection is None:
            return False
        request.send_on(connection)
        return True

    async def complete(self, request: OutgoingRequest) -> httpx.Response:
        """Return the answer to what was begun: sent already, or only now."""
        # Taken, not looked up: whose it is may well hold this request, a cycle for the garbage collector.
        on_interim, request.on_interim = request.on_interim, None
        if request.connection is not None:
            request.say_sent()
            try:
                await request.answer.head(on_interim=on_interim)
                return _Response(request.answer)
            except (httpx.ReadError, httpx.RemoteProtocolError):
                # The upstream closed the idle connection while the request was on its way.
                if not (request.repeatable and request.connection.heard_nothing_of(request.answer)):
                    raise
        limit_s = request.timeout.get("connect", self._connect_timeout_s)
        request.send_on(await self._connect(self._origin_of(request.url), limit_s))
        request.say_sent()
        await request.answer.head(on_interim=on_interim)
        return _Response(request.answer)

    @property
    def idle(self) -> int:
        """How many connections are open for whoever comes next."""
        return self._idle_count

    @property
    def busy(self) -> int:
        """How many connections carry an exchange."""
        return max(0, len(self._connections) - self._idle_count)

    async def aclose(self) -> None:
        """Abort every connection, those in use too; requests after this raise RuntimeError."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        for connection in list(self._connections):
            connection.fail(httpx.ReadError("the transport was closed"))
        await asyncio.sleep(0)

    # Opening

    async def _connect(self, origin: Origin, limit_s: float | None) -> Connection:
        try:
            async with asyncio.timeout(limit_s):
                connection = await self._open(origin)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"no connection to {origin[1]}:{origin[2]} within {limit_s} s") from exc
        if self._closed:
            connection.abort()
            raise RuntimeError("the transport was closed")
        self._connections.add(connection)
        self.opened += 1
        return connection

    async def _open(self, origin: Origin) -> Connection:
        scheme, host, port = origin
        if scheme not in _DEFAULT_PORTS or not host:
            raise httpx.UnsupportedProtocol(f"an http:// or https:// URL is needed, not {scheme}://{host}")
        if self._closed:
            raise RuntimeError("the transport was closed")
        sock = await open_socket(host, port, proxy_url=self._proxy_url)
        connection = Connection(origin, buffer=self._buffer, on_free=self._keep, on_lost=self._forget)
        context = self._tls_context() if scheme == "https" else None
        try:
            await attach(connection, sock, buffer=self._buffer, context=context, server_hostname=host)
        except (OSError, ValueError) as exc:
            raise httpx.ConnectError(f"no TLS with {host}:{port}: {exc}") from exc
        return connection

    def _tls_context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = tls_context(extra_ca_file=None)
        return self._ssl_context

    def _origin_of(self, url: httpx.URL) -> Origin:
        known_url, origin = self._last_origin
        if url is not known_url:
            scheme = url.scheme
            origin = (scheme, url.host, url.port or _DEFAULT_PORTS.get(scheme, 0))
            self._last_origin = url, origin
        return origin

    # Keeping

    def _take_idle(self, origin: Origin) -> Connection | None:
        """The connection used last, of those known to be alive: most others may then grow old and go."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            self._idle_count -= 1
            if connection.usable:
                return connection
        return None

    def _keep(self, connection: Connection) -> None:
        if self._closed or self._idle_count >= self._max_idle:
            connection.abort()
            return
        idle = self._idle.get(connection.origin)
        if idle is None:
            idle = self._idle[connection.origin] = []
        idle.append(connection)
        self._idle_count += 1
        connection.idle_since_s = connection.loop.time()
        if self._reaper is None:
            self._reaper = connection.loop.call_later(self._idle_timeout_s, self._reap, connection.loop)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle and connection in idle:
            idle.remove(connection)
            self._idle_count -= 1

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle too long; come back when the next one will have been."""
        oldest_s = loop.time() - self._idle_timeout_s
        next_s = None
        for origin, idle in list(self._idle.items()):
            while idle and idle[0].idle_since_s <= oldest_s:
                self._idle_count -= 1
                idle.pop(0).abort()
            if not idle:
                del self._idle[origin]
            elif next_s is None or idle[0].idle_since_s < next_s:
                next_s = idle[0].idle_since_s
        self._reaper = None
        if next_s is not None:
            self._reaper = loop.call_at(next_s + self._idle_timeout_s, self._reap, loop)


class _Response(httpx.Response):
    """A response that builds its `Headers` when somebody looks: 4 µs for 14 fields."""

    next_request = None
    default_encoding = "utf-8"
    is_closed = is_stream_consumed = False
    _request = None
    _num_bytes_downloaded = 0

    def __init__(self, answer: Answer) -> None:
        # What httpx's own constructor sets for a stream, without the headers.
        self.status_code = answer.status
        self.stream = answer
        self.extensions = {
            "http_version": answer.http_version,
            "reason_phrase": answer.reason,
            "raw_headers": answer.fields,
        }
        self.history = []
        self._fields = answer.fields
        self._lazy_headers: httpx.Headers | None = None

    @property
    def headers(self) -> httpx.Headers:
        if self._lazy_headers is None:
            self._lazy_headers = httpx.Headers(self._fields)
        return self._lazy_headers

    @headers.setter
    def headers(self, headers: httpx.Headers) -> None:
        self._lazy_headers = headers
