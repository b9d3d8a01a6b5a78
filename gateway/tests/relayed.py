"""Requests through the relay of a live proxy, and answers to them, byte for byte."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy

MIB = 1 << 20


def fetch(proxy: LiveProxy, target: str = "/v1/models", method: str = "GET", **options: Any) -> httpx.Response:
    return proxy.request(method, target, **options)


# What the proxy does while a connection to the upstream is idle, and while none is: the former without a task.
either_way = pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "not connected"])


def connect(proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool) -> None:
    if is_connected:
        assert fetch(proxy).status_code == 200
    else:
        upstream.drop_idle_connections()
    upstream.requests.clear()


def plays(raw: bytes) -> object:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(raw)

    return script
