"""One connection to Redis for many callers: commands go out at once, answers come back in their order.

A pool of connections would cost each request three times as much, and two hundred requests at once two hundred
connections, whose handshakes alone outlast the time that an answer may take.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

logger = logging.getLogger("gateway.redis")

_CONNECT_SECONDS = 2.0
_MOST_WAITING = 10_000


class RedisAwayError(Exception):
    """No answer in time, no connection, or an answer that is an error; the text names neither address nor password."""


class RedisLine:
    """`call` sends one command. `keep` keeps the connection: run it as a task. Each begins with the commands `first`.

    An answer that takes longer than `deadline_s` counts as none; a connection on which nothing has come for
    `silence_s`, though something should, is given up.
    """

    def __init__(
        self, url: str, *, deadline_s: float = 0.05, silence_s: float = 1.0, first: Sequence[tuple[str, ...]] = ()
    ) -> None:
        self._url = url
        self._first = first
        self.deadline_s = deadline_s
        self._silence_s = silence_s
        self._protocol: _Protocol | None = None
        # Set at each new connection; whoever looks at it clears it.
        self.opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._protocol is not None

    def call(self, *command: str | bytes | int | float) -> asyncio.Future[Any]:
        """Return what becomes the answer. Raises RedisAwayError, at once or from the future."""
        protocol = self._protocol
        if protocol is None:
            raise RedisAwayError("no connection")
        return protocol.call(command, self.deadline_s)

    def drop(self) -> None:
        """Give the connection up, for a new one."""
        if self._protocol is not None:
            self._protocol.abort()

    async def keep(self) -> None:
        """Hold a connection, made anew whenever it ends, until cancelled."""
        wait_s = 0.1
        while True:
            try:
                await self._hold()
                wait_s = 0.1
            except (OSError, RedisAwayError, TimeoutError, ssl.SSLError) as exc:
                wait_s = min(wait_s * 2, 2.0)
                logger.debug("no connection to Redis: %s", type(exc).__name__)
            await asyncio.sleep(wait_s)

    async def _hold(self) -> None:
        async with asyncio.timeout(_CONNECT_SECONDS):
            protocol = await self._connected()
        self._protocol = protocol
        self.opened.set()
        try:
            await protocol.closed
        finally:
            self._protocol = None
            protocol.abort()

    async def _connected(self) -> _Protocol:
        loop = asyncio.get_running_loop()
        parts = urlsplit(self._url)
        context = _tls_context(parts.query) if parts.scheme == "rediss" else None
        if parts.scheme == "unix":
            _, protocol = await loop.create_unix_connection(lambda: _Protocol(self._silence_s), parts.path)
        else:
            host, port = parts.hostname or "localhost", parts.port or 6379
            _, protocol = await loop.create_connection(lambda: _Protocol(self._silence_s), host, port, ssl=context)
        try:
            for command in [*_greeting(self._url), *self._first]:
                await protocol.call(command, _CONNECT_SECONDS)
        except BaseException:
            protocol.abort()
            raise
        return protocol


def _tls_context(query: str) -> ssl.SSLContext:
    """Return what redis-py makes of an address's `ssl_ca_certs` and `ssl_cert_reqs`."""
    asked = parse_qs(query)
    context = ssl.create_default_context(cafile=asked.get("ssl_ca_certs", [None])[0])
    if asked.get("ssl_cert_reqs", [""])[0].lower() in ("none", "cert_none"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _greeting(url: str) -> list[tuple[str, ...]]:
    """Return the commands that a new connection begins with, for the address as redis-py reads it."""
    parts = urlsplit(url)
    asked = parse_qs(parts.query)
    found: list[tuple[str, ...]] = []
    if parts.password:
        user = unquote(parts.username or "")
        found.append(("AUTH", user, unquote(parts.password)) if user else ("AUTH", unquote(parts.password)))
    path = "" if parts.scheme == "unix" else parts.path.strip("/")
    if (database := asked.get("db", [path])[0]) not in ("", "0"):
        found.append(("SELECT", database))
    return [*found, ("PING",)]


class _Protocol(asyncio.Protocol):
    def __init__(self, silence_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._silence_s = silence_s
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Told by nobody else: of a timer that is due at once uvloop makes a handle that does not know it.
        self._wakes_at = 0.0
        self._heard_at = self._loop.time()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def call(self, command: tuple[Any, ...], deadline_s: float) -> asyncio.Future[Any]:
        if self._transport is None or self._transport.is_closing() or len(self._waiting) >= _MOST_WAITING:
            raise RedisAwayError("no connection")
        answer: asyncio.Future[Any] = self._loop.create_future()
        now = self._loop.time()
        if not self._waiting:
            self._heard_at = now
        self._waiting.append((answer, now + deadline_s))
        if self._timer is None or self._wakes_at > now + deadline_s:
            self._wake_at(now + deadline_s, self._look)
        self._transport.write(hiredis.pack_command(command))
        return answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            self._reader.feed(data)
            while self._waiting and (reply := self._reader.gets()) is not False:
                answer, _ = self._waiting.popleft()
                if answer.done():
                    continue
                if isinstance(reply, Exception):
                    answer.set_exception(RedisAwayError(str(reply).partition(" ")[0]))
                else:
                    answer.set_result(reply)
        except hiredis.ProtocolError:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for answer, _ in self._waiting:
            if not answer.done():
                answer.set_exception(RedisAwayError("connection lost"))
        self._waiting.clear()
        if not self.closed.done():
            self.closed.set_result(None)

    def _look(self) -> None:
        """A timer runs before what has arrived is read: look once more behind that, lest a busy loop blame Redis."""
        self._wake_at(self._loop.time() + 0.001, self._give_up)

    def _wake_at(self, when: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = when
        self._timer = self._loop.call_at(when, callback)

    def _give_up(self) -> None:
        self._timer = None
        now = self._loop.time()
        for answer, deadline in self._waiting:
            if deadline > now:
                self._wake_at(deadline, self._look)
                break
            if not answer.done():
                answer.set_exception(RedisAwayError("no answer in time"))
        if self._waiting and now - self._heard_at > self._silence_s:
            self.abort()
        elif self._waiting and self._timer is None:
            self._wake_at(now + self._silence_s, self._look)
