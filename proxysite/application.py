"""Who gets a request: /v1 and below goes to the gateway as raw ASGI, everything else to Django."""

from __future__ import annotations

import asyncio
import functools
import json
import ssl
from typing import Any
from urllib.parse import unquote

import httpx2 as httpx
from django.conf import settings
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from billing import policy
from gateway.admission import Policy
from gateway.errors import BodyTooLargeError, PathRefusedError
from gateway.estimation import Estimator
from gateway.journal import Journal
from gateway.metering import Metering
from gateway.paths import is_gateway_path
from gateway.realtime import Realtime
from gateway.relay import Receive, Relay, RelayLimits, Scope, Send, send_error
from gateway.sandbox.sockets import connect_realtime
from gateway.sandbox.transport import SandboxTransport
from gateway.transport import PooledTransport, tls_context
from proxysite import ledger

_SITE_BODY_MAX_BYTES = 8 * 1024 * 1024
_SITE_BODY_SILENCE_SECONDS = 30.0
_FAREWELL_SECONDS = 3.0
# Below /v1 and yet ours: OpenAI refuses API keys there, so the ledger answers what apps ask.
_LEDGER_PATHS = frozenset(b"/v1/dashboard/billing/" + name for name in (b"subscription", b"usage", b"credit_grants"))
_ALIVE = json.dumps({"status": "ok"}).encode()


class Application:
    """The ASGI application of one worker; its lifespan owns the connections to the upstream."""

    def __init__(self, site: Any) -> None:
        self._site: Any = ProxyHeadersMiddleware(site, trusted_hosts=settings.TRUSTED_PROXIES)
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
            on_tick=self._keep_policy,
        )
        metering = Metering(
            pepper=settings.KEY_PEPPER.encode(),
            append=self._journal.append,
            estimates=self._estimator,
            splices_usage=settings.SPLICE_USAGE,
        )
        self._policy = Policy(load=ledger.blocked_fingerprints, apply=functools.partial(setattr, metering, "blocked"))
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
                drain_timeout_s=settings.DRAIN_TIMEOUT_SECONDS if settings.ON_CLIENT_DISCONNECT == "drain" else 0.0,
                drain_max_bytes=settings.DRAIN_MAX_BYTES,
            ),
            metering=metering,
            sandbox=sandbox,
            sandbox_key=settings.SANDBOX_KEY,
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._realtime(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["raw_path"] not in _LEDGER_PATHS and is_gateway_path(scope["raw_path"]):
                await self._relay(scope, receive, send)
                return
        except PathRefusedError as error:
            await send_error(send, error)
            return
        if scope["raw_path"] == b"/healthz":
            await _answer_alive(send)
            return
        scope["path"] = unquote(scope["raw_path"].decode("ascii"))
        if (_content_length(scope) or 0) > _SITE_BODY_MAX_BYTES:
            await send_error(send, BodyTooLargeError("The request body is too large for this page."))
            return
        await self._site(scope, _bounded(receive), send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        self._ledger.start()
        self._journal.start()
        tasks = [asyncio.create_task(self._relay.keep_time())]
        if settings.REDIS_URL:
            tasks.append(asyncio.create_task(self._policy.listen(settings.REDIS_URL, policy.CHANNEL)))
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        await self._relay.drain(_FAREWELL_SECONDS)
        for task in tasks:
            task.cancel()
        await self._transport.aclose()
        await self._estimator.aclose()
        await asyncio.to_thread(self._journal.close)
        await asyncio.to_thread(self._ledger.close)
        await send({"type": "lifespan.shutdown.complete"})

    def _keep_policy(self) -> None:
        """Runs in the journal's thread, where waiting for the database holds up nobody."""
        self._policy.refresh_if_old()


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


async def _answer_alive(send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_ALIVE))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _ALIVE})


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)
    return None


def _bounded(receive: Receive) -> Receive:
    """Bound what Django reads before any view runs: it spools whole bodies to disk, however large and slow."""
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
        received_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        return message if received_bytes <= _SITE_BODY_MAX_BYTES else {"type": "http.disconnect"}

    return bounded_receive
