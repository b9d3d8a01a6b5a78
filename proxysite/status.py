"""`/status.json`: whether the upstream answers now, and what this gateway adds to a request, from real probes.

A probe is one `GET /v1/models` without a key, through the relay and its transport as every request goes: no upstream
charges for it, and egress proxy, certificates and connections are those of real traffic. It is not metered.
However many ask, there is at most one probe at a time and one in FRESH_S seconds, in each worker.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import msgspec

from gateway.asgi import Message, Receive, Scope, Send
from gateway.relay import Relay

PATH = b"/status.json"
FRESH_S = 15.0

_PATIENCE_S = 5.0
_KEPT_SAMPLES = 5
_HEADERS = (
    (b"content-type", b"application/json"),
    (b"cache-control", b"public, max-age=5"),
    (b"access-control-allow-origin", b"*"),
    (b"x-content-type-options", b"nosniff"),
)
_METHOD_NOT_ALLOWED = b'{"error": "Only GET and HEAD are answered here."}'


class Upstream(msgspec.Struct, frozen=True):
    """`status` is that of its answer, 0 where no whole one came; `answer_ms` is until the answer's head."""

    reachable: bool
    status: int
    answer_ms: float | None


class Status(msgspec.Struct, frozen=True):
    """What the last probe found; `added_ms` is the median of the last few, None while there is none."""

    upstream: Upstream
    added_ms: float | None
    checked_at: str


class Stopwatch(httpx.AsyncBaseTransport):
    """The transport inside, timed: what it takes is the upstream's and the network's, the rest is ours."""

    def __init__(self, inside: httpx.AsyncBaseTransport) -> None:
        self._inside = inside
        self.taken_s = 0.0
        self.status = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.status = 0
        started_s = time.perf_counter()
        response = await self._inside.handle_async_request(request)
        self.taken_s = time.perf_counter() - started_s
        self.status = response.status_code
        return response


class StatusPage:
    """An ASGI application. `relay` asks through `stopwatch`, and nobody else uses either."""

    def __init__(self, relay: Relay, stopwatch: Stopwatch) -> None:
        self._relay = relay
        self._stopwatch = stopwatch
        self._added_ms: deque[float] = deque(maxlen=_KEPT_SAMPLES)
        self._probe: asyncio.Task[Status] | None = None
        self._stale_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, _METHOD_NOT_ALLOWED, (b"allow", b"GET, HEAD"))
            return
        body = msgspec.json.encode(await self._status())
        await _answer(send, 200, body, is_head=scope["method"] == "HEAD")

    async def _status(self) -> Status:
        now_s = asyncio.get_running_loop().time()
        if self._probe is None or (self._probe.done() and now_s >= self._stale_at):
            self._probe = asyncio.create_task(self._look())
            self._stale_at = now_s + FRESH_S
        # Shielded: who asked first may leave, the others wait on.
        return await asyncio.shield(self._probe)

    async def _look(self) -> Status:
        caller = _Caller()
        started_s = time.perf_counter()
        asked = asyncio.create_task(self._relay(caller.scope(), caller.receive, caller.send))
        done, _ = await asyncio.wait({asked}, timeout=_PATIENCE_S)
        if not done:
            caller.leave()
            await asyncio.wait({asked}, timeout=_PATIENCE_S)
        checked_at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        is_whole = asked.done() and not asked.cancelled() and asked.exception() is None and caller.has_all
        status = self._stopwatch.status if is_whole else 0
        if not 0 < status < 500:
            return Status(Upstream(False, status, None), None, checked_at)
        taken_s = self._stopwatch.taken_s
        self._added_ms.append(max(0.0, caller.answered_s - started_s - taken_s) * 1000)
        upstream = Upstream(True, status, round(taken_s * 1000, 1))
        return Status(upstream, round(statistics.median(self._added_ms), 2), checked_at)


class _Caller:
    """The probe's end of the exchange: a client without a key, who hangs up when told to."""

    def __init__(self) -> None:
        self.answered_s = 0.0
        self.has_all = False
        self._leave: Callable[[], None] = lambda: None

    def scope(self) -> Scope:
        return {
            "type": "http",
            "method": "GET",
            "raw_path": b"/v1/models",
            "target": b"/v1/models",
            "headers": [(b"accept", b"application/json"), (b"user-agent", b"status-probe")],
            "on_disconnect": functools.partial(setattr, self, "_leave"),
        }

    def leave(self) -> None:
        self._leave()

    async def receive(self) -> Any:
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.answered_s = time.perf_counter()
        elif message["type"] == "http.response.body":
            self.has_all = not message.get("more_body", False)


async def _answer(send: Send, status: int, body: bytes, *more: tuple[bytes, bytes], is_head: bool = False) -> None:
    headers = [*_HEADERS, (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if is_head else body})
