"""The relay under the production server, with nothing metered, recorded or limited: what passing bytes costs by itself.

`python -m bench` starts it as the proxy "relay", by gunicorn with the gateway's own settings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from billing.events import Outcome
from gateway import headers as wire
from gateway.asgi import Receive, Scope, Send
from gateway.estimation import Estimator
from gateway.metering import Metering
from gateway.relay import Relay, RelayLimits
from gateway.request_meter import RequestMeter
from gateway.sandbox.transport import SandboxTransport
from gateway.transport import PooledTransport, tls_context
from proxysite import settings


class _NoMeter(RequestMeter):
    """Knows of a request what the relay itself asks for, and looks at none of its bytes."""

    def look(self) -> None:
        pass

    def wants_whole_body(self, request: wire.ToUpstream) -> bool:
        return False

    def take_part(self, part: bytes) -> None:
        pass

    def take_head(self, status: int, answer: wire.ToClient) -> None:
        self.status = status

    def feed(self, chunk: bytes) -> None:
        pass

    def may_be_last(self, events: bytes) -> bool:
        return False

    def finish_soon(
        self, outcome: Outcome, *, status: int | None = None, is_whole: bool = False
    ) -> Awaitable[None] | None:
        return None

    def settle(self) -> None:
        pass


class _NoMetering(Metering):
    def begin(self, scope: Any) -> RequestMeter:
        return _NoMeter(self, scope)


class RelayAlone:
    def __init__(self) -> None:
        context = tls_context(extra_ca_file=settings.UPSTREAM_CA_FILE or None)
        self._relay = Relay(
            upstream_url=settings.UPSTREAM_URL,
            transport=PooledTransport(ssl_context=context),
            limits=RelayLimits(),
            metering=_NoMetering(pepper=b"none", journal=[], estimates=Estimator()),
            sandbox=SandboxTransport(),
            sandbox_key=settings.SANDBOX_KEY,
        )

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None] | None:
        if scope["type"] == "lifespan":
            return self._lifespan(receive, send)
        return _answer_alive(send) if scope["raw_path"] == b"/healthz" else self._relay.begin(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        keeping = asyncio.create_task(self._relay.keep_time())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        keeping.cancel()
        await send({"type": "lifespan.shutdown.complete"})


async def _answer_alive(send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


application = RelayAlone()
