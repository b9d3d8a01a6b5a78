"""Who gets a request: /v1 and below goes to the gateway as raw ASGI, everything else to Django."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httpx2 as httpx
from django.conf import settings
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from billing import policy
from billing.reserving import Prices
from gateway.admission import Policy
from gateway.asgi import Receive, Scope, Send, send_error
from gateway.errors import BodyTooLargeError, OverloadedError, PathRefusedError
from gateway.estimation import Estimator
from gateway.journal import Journal
from gateway.limit_redis import RedisStore
from gateway.metering import Metering
from gateway.paths import is_gateway_path, is_plainly_gateway_path
from gateway.realtime import Realtime
from gateway.relay import Relay, RelayLimits
from gateway.sandbox.sockets import connect_realtime
from gateway.sandbox.transport import SandboxTransport
from gateway.transport import PooledTransport, tls_context
from gateway.workers import WorkerReport
from proxysite import ledger, limiting, status
from proxysite.metrics import MetricsPage, WorkerMetrics
from sessions_api import chat

if TYPE_CHECKING:
    from proxysite.tracing import Tracing

logger = logging.getLogger("proxysite.application")

_SITE_BODY_MAX_BYTES = 8 * 1024 * 1024
_SITE_BODY_SILENCE_SECONDS = 30.0
# Of all requests to the site together, while they are read and answered: Django holds each body whole.
_SITE_BODIES_MAX_BYTES = 64 * 1024 * 1024
_FAREWELL_SECONDS = 3.0
_POLICY_PATIENCE_SECONDS = 5.0
_POLICY_READ_SECONDS = 40.0  # gunicorn gives a worker 60 s to start
_REDIS_PATIENCE_SECONDS = 1.0
# Below /v1 and yet ours: OpenAI refuses API keys there, so the ledger answers what apps ask.
_LEDGER_PATHS = frozenset(b"/v1/dashboard/billing/" + name for name in (b"subscription", b"usage", b"credit_grants"))
# What stands between two slashes there may itself hold slashes: the views decode it.
_ENCODED_BELOW = "/pro/sessions/"
_ALIVE = json.dumps({"status": "ok"}).encode()


class Application:
    """The ASGI application of one worker; its lifespan owns the connections to the upstream."""

    def __init__(self, site: Any) -> None:
        self._site: Any = ProxyHeadersMiddleware(site, trusted_hosts=settings.TRUSTED_PROXIES)
        self._site_bodies = _SiteBodies()
        context = tls_context(extra_ca_file=settings.UPSTREAM_CA_FILE or None)
        sandbox = SandboxTransport() if settings.SANDBOX_ENABLED else None
        self._transport = upstream_transport(context)
        self._estimator = Estimator()
        self._ledger = ledger.LedgerProcess()
        self._journal = Journal(
            settings.JOURNAL_DIR,
            sink=self._ledger.record,
            flush_interval_s=settings.JOURNAL_FLUSH_SECONDS,
            max_bytes=settings.JOURNAL_MAX_BYTES,
            on_tick=lambda: self._policy_reader.keep(),
        )
        self._tracing = _tracing()
        metering = Metering(
            pepper=settings.KEY_PEPPER.encode(),
            journal=self._journal,
            estimates=self._estimator,
            splices_usage=settings.SPLICE_USAGE,
            logs_access=settings.ACCESS_LOG,
            trace=self._tracing.record if self._tracing else None,
        )
        prices = Prices()
        self._limiter = limiting.make_limiter(metering, prices)
        self._policy_reader = limiting.PolicyReader(self._limiter, prices)
        self._policy = Policy(load=self._read_policy, apply=self._apply)
        self._relay = Relay(
            upstream_url=settings.UPSTREAM_URL,
            transport=self._transport,
            limits=RelayLimits(
                connect_timeout_s=settings.CONNECT_TIMEOUT_SECONDS,
                first_byte_timeout_s=settings.FIRST_BYTE_TIMEOUT_SECONDS,
                silence_timeout_s=settings.SILENCE_TIMEOUT_SECONDS,
                max_body_bytes=settings.MAX_BODY_BYTES,
                max_open_streams=settings.MAX_OPEN_STREAMS,
                sse_event_max_bytes=settings.SSE_EVENT_MAX_BYTES,
                max_interim_answers=settings.MAX_INTERIM_RESPONSES,
                drain_timeout_s=settings.DRAIN_TIMEOUT_SECONDS if settings.ON_CLIENT_DISCONNECT == "drain" else 0.0,
                drain_max_bytes=settings.DRAIN_MAX_BYTES,
            ),
            metering=metering,
            sandbox=sandbox,
            sandbox_key=settings.SANDBOX_KEY,
        )
        self._status = self._status_page()
        self._chat = chat.Chat(self._relay)
        self._report = WorkerReport(
            open_streams=lambda: self._relay.open_streams,
            journal=self._journal.status,
            limits_away=lambda: self._limiter.is_away,
        )
        self._worker_metrics = WorkerMetrics(
            self._relay,
            journal=self._journal,
            recorded=self._ledger.sums,
            transport=self._transport,
            limiter=self._limiter,
        )
        self._metrics: Any = ProxyHeadersMiddleware(
            MetricsPage(self._worker_metrics),  # type: ignore[arg-type]
            trusted_hosts=settings.TRUSTED_PROXIES,
        )
        self._realtime = Realtime(
            self._relay,
            ssl_context=context,
            proxy_url=settings.UPSTREAM_PROXY or None,
            max_message_bytes=settings.WEBSOCKET_MAX_MESSAGE_BYTES,
            ping_interval_s=settings.WEBSOCKET_PING_SECONDS,
            sandbox=functools.partial(connect_realtime, sandbox=sandbox.sandbox) if sandbox else None,
            sandbox_key=settings.SANDBOX_KEY,
        )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None] | None:
        kind = scope["type"]
        if kind == "http":
            raw_path = scope["raw_path"]
            if is_plainly_gateway_path(raw_path) and raw_path not in _LEDGER_PATHS:
                return self._relay.begin(scope, receive, send)
            return self._http(scope, receive, send)
        if kind == "websocket":
            return self._realtime(scope, receive, send)
        return self._lifespan(receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["raw_path"] not in _LEDGER_PATHS and is_gateway_path(scope["raw_path"]):
                await self._relay(scope, receive, send)
                return
        except PathRefusedError as error:
            self._relay.metering.tally.failed(error.code)
            await send_error(send, error, request_id=self._relay.metering.new_event_id())
            return
        if scope["raw_path"] == chat.PATH:
            await self._chat(scope, receive, send)
            return
        if scope["raw_path"] == b"/healthz":
            await _answer_alive(send)
            return
        if scope["raw_path"] == b"/metrics":
            await self._metrics(scope, receive, send)
            return
        if scope["raw_path"] == status.PATH:
            await self._status(scope, receive, send)
            return
        path = scope["raw_path"].decode("ascii")
        scope["path"] = path if path.startswith(_ENCODED_BELOW) else unquote(path)
        if (_content_length(scope) or 0) > _SITE_BODY_MAX_BYTES:
            await send_error(send, BodyTooLargeError("The request body is too large for this page."))
            return
        if self._site_bodies.are_too_many:
            await send_error(send, OverloadedError("Too many requests at once; try again soon.", retry_after_s=5))
            return
        await self._site_bodies.pass_on(self._site, scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        # Before the journal: it brings to the ledger what is counted here as not yet in it.
        await self._read_policy_at_start()
        self._worker_metrics.start()
        self._ledger.start()
        self._journal.start()
        self._policy.start()
        self._report.start()
        tasks = [asyncio.create_task(self._relay.keep_time())]
        if settings.REDIS_URL:
            tasks.append(asyncio.create_task(self._policy.listen(settings.REDIS_URL, policy.CHANNEL)))
        if isinstance(self._limiter.store, RedisStore):
            tasks.append(asyncio.create_task(self._limiter.store.keep()))
            await self._limiter.store.wait_until_open(_REDIS_PATIENCE_SECONDS)
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        await self._relay.drain(_FAREWELL_SECONDS)
        self._chat.close()
        for task in tasks:
            task.cancel()
        self._policy.close()
        await self._transport.aclose()
        await self._estimator.aclose()
        await asyncio.to_thread(self._report.close)
        await asyncio.to_thread(self._journal.close)
        await asyncio.to_thread(self._ledger.close)
        await asyncio.to_thread(self._worker_metrics.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        await send({"type": "lifespan.shutdown.complete"})

    def _status_page(self) -> status.StatusPage:
        """Return a page whose probes go the way of every request, and are in no record."""
        stopwatch = status.Stopwatch(self._transport)
        unrecorded = Metering(pepper=b"", journal=deque(maxlen=0), estimates=self._estimator)
        limits = RelayLimits(connect_timeout_s=settings.CONNECT_TIMEOUT_SECONDS)
        relay = Relay(upstream_url=settings.UPSTREAM_URL, transport=stopwatch, limits=limits, metering=unrecorded)
        return status.StatusPage(relay, stopwatch)

    async def _read_policy_at_start(self) -> None:
        """Know what is decided before the first request; a database that is away keeps nobody waiting for long."""
        self._apply(limiting.Decisions(frozenset(), limiting.rules_at_first()))
        reading = asyncio.create_task(asyncio.to_thread(limiting.read_at_start, self._policy_reader))
        await asyncio.wait({reading}, timeout=_POLICY_PATIENCE_SECONDS)
        # One that answers has much to say: nobody who is blocked shall pass meanwhile.
        more_s = _POLICY_READ_SECONDS - _POLICY_PATIENCE_SECONDS if self._policy_reader.is_answered else 0
        try:
            self._apply(await asyncio.wait_for(asyncio.shield(reading), more_s))
        except Exception as exc:  # whatever it is, traffic goes on, and the next look may succeed
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())
            logger.warning("what operators have decided could not be read yet: %s", type(exc).__name__)

    def _read_policy(self) -> Iterator[limiting.Decisions]:
        with ledger.kept_connection():
            yield from self._policy_reader.parts()

    def _apply(self, decisions: limiting.Decisions) -> None:
        """Let everything that is decided hold from now on; from any thread."""
        self._relay.metering.blocked = decisions.blocked
        self._limiter.rules = decisions.rules
        self._relay.limiter = self._limiter if decisions.rules.limits_anything else None


def upstream_transport(context: ssl.SSLContext) -> httpx.AsyncBaseTransport:
    """Return the connections to the upstream that the settings ask for."""
    if settings.UPSTREAM_TRANSPORT == "own":
        return PooledTransport(
            ssl_context=context,
            proxy_url=settings.UPSTREAM_PROXY or None,
            connect_timeout_s=settings.CONNECT_TIMEOUT_SECONDS,
        )
    return httpx.AsyncHTTPTransport(
        verify=context,
        trust_env=False,
        proxy=settings.UPSTREAM_PROXY or None,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=512, keepalive_expiry=60),
    )


def _tracing() -> Tracing | None:
    """Return what requests are traced with, if they are."""
    if not settings.OTEL_ENABLED:
        return None
    from proxysite.tracing import Tracing  # needs packages that others need not have

    return Tracing(upstream_url=settings.UPSTREAM_URL, sandbox_key=settings.SANDBOX_KEY)


async def _answer_alive(send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_ALIVE))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _ALIVE})


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


class _SiteBodies:
    """Bounds what Django reads before any view runs: it takes in whole bodies, however large, slow and many."""

    def __init__(self) -> None:
        self._held_bytes = 0

    @property
    def are_too_many(self) -> bool:
        return self._held_bytes > _SITE_BODIES_MAX_BYTES

    async def pass_on(self, site: Any, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the site with a body of bounded size and silence; a request that breaks a bound sees its client leave."""
        received_bytes = 0
        complete = False

        async def bounded_receive() -> Any:
            nonlocal received_bytes, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(_SITE_BODY_SILENCE_SECONDS):
                    message = await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}
            body_bytes = len(message.get("body", b""))
            received_bytes += body_bytes
            self._held_bytes += body_bytes
            complete = not message.get("more_body", False)
            is_bounded = received_bytes <= _SITE_BODY_MAX_BYTES and not self.are_too_many
            return message if is_bounded else {"type": "http.disconnect"}

        try:
            await site(scope, bounded_receive, send)
        finally:
            self._held_bytes -= received_bytes
