"""Every HTTP request to /v1 and below: who answers it, how many at once, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from gateway import headers as wire
from gateway.arrivals import Arrivals
from gateway.asgi import Receive, Scope, Send, send_error
from gateway.errors import OverloadedError
from gateway.exchange import Exchange
from gateway.limiter import Limiter
from gateway.metering import Metering
from gateway.request_meter import RequestMeter


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Bounds of one exchange. Each time, in seconds, is for one phase; none is for the whole."""

    connect_timeout_s: float = 10.0
    first_byte_timeout_s: float = 600.0
    silence_timeout_s: float = 300.0
    max_body_bytes: int = 2 << 30
    max_open_streams: int = 4096
    sse_event_max_bytes: int = 1 << 20
    # Of one exchange, that reach its client; whatever comes beyond that is dropped.
    max_interim_answers: int = 64
    # What may still be read of an answer after its client has left, for its true usage; 0 s: nothing.
    drain_timeout_s: float = 0.0
    drain_max_bytes: int = 16 << 20


class Relay:
    """An ASGI application that passes each request to one upstream, and the answer back.

    `sandbox`, where given, answers the requests that carry `sandbox_key`. `limiter` is None while nothing is limited;
    it may change between two requests.
    """

    limiter: Limiter | None = None

    def __init__(
        self,
        *,
        upstream_url: str,
        transport: httpx.AsyncBaseTransport,
        limits: RelayLimits,
        metering: Metering,
        sandbox: httpx.AsyncBaseTransport | None = None,
        sandbox_key: str = "",
    ) -> None:
        self.metering = metering
        self.url = httpx.URL(upstream_url)
        self.host = self.url.netloc
        self.base_path = self.url.raw_path.rstrip(b"/")
        self.limits = limits
        # Each exchange times the upstream's silence, but for that inside an upload: only the transport sees it.
        self.timeouts: dict[str, float | None] = {
            "connect": limits.connect_timeout_s,
            "write": limits.silence_timeout_s,
        }
        self.gathered_bytes = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.exchanges: set[Exchange] = set()
        self.arrivals = Arrivals(self)
        self.open_sockets = 0
        self._transport = transport
        self._sandbox = sandbox
        self._sandbox_fingerprint = metering.fingerprint(sandbox_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = self.begin({**scope, "shortcuts": None}, receive, send)
        if passing is not None:
            await passing

    def begin(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None] | None:
        """Do what can be done without waiting, and return what is to be awaited; None as `Shortcuts` says."""
        if scope["method"] == "OPTIONS" and wire.is_preflight(scope["headers"]):
            return _allow(scope, send)
        if len(self.exchanges) + self.open_sockets >= self.limits.max_open_streams:
            return self._refuse(scope, send)
        exchange = Exchange(self, scope, receive, send)
        self.exchanges.add(exchange)  # here, not in its task: many may be called for before any task runs
        return None if exchange.begin() else exchange.run()

    @property
    def open_streams(self) -> int:
        return len(self.exchanges) + self.open_sockets

    async def _refuse(self, scope: Scope, send: Send) -> None:
        meter = self.metering.begin(scope)
        error = OverloadedError("Too many open streams; try again soon.", retry_after_s=1)
        self.metering.tally.failed(error.code)
        await meter.finish("refused", status=error.status)
        await send_error(send, error, request_id=meter.request_id)

    async def keep_time(self) -> None:
        """End the exchanges whose deadline has passed, until cancelled.

        One task looks at all of them now and then: a timer for each would cost each request more.
        """
        loop = asyncio.get_running_loop()
        limits = self.limits
        pause_s = min(1.0, limits.first_byte_timeout_s / 8, limits.silence_timeout_s / 8)
        while True:
            await asyncio.sleep(pause_s)
            now = loop.time()
            for exchange in [exchange for exchange in self.exchanges if exchange.is_overdue(now)]:
                exchange.give_up()

    async def drain(self, timeout_s: float) -> None:
        """Wait until every exchange has ended: those that the server has cancelled still say so."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.open_streams and loop.time() < deadline:  # noqa: ASYNC110 - once in a process's life
            await asyncio.sleep(0.01)

    def find_loop(self) -> asyncio.AbstractEventLoop:
        self.loop = asyncio.get_running_loop()
        return self.loop

    def target_for(self, meter: RequestMeter, target: bytes) -> bytes:
        """Return what a request asks of its upstream; the sandbox is below no path of the other's address."""
        return target if self.upstream_for(meter) is self._sandbox else self.base_path + target

    def upstream_for(self, meter: RequestMeter) -> httpx.AsyncBaseTransport:
        if self._sandbox is not None and meter.fingerprint == self._sandbox_fingerprint:
            return self._sandbox
        return self._transport


async def _allow(scope: Scope, send: Send) -> None:
    headers = wire.preflight(scope["headers"])
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body"})
