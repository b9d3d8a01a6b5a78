"""Every test in this directory runs against httpx's own transport and ours, ours on both event loops."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2 as httpx
import pytest
import trustme
import uvloop

from gateway.tests.calls import MakeTransport
from gateway.tests.fake_upstream import FakeUpstream
from gateway.transport import PooledTransport, tls_context


@pytest.fixture(params=["httpx", "own", "own-uvloop"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def event_loop_policy(flavour: str) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if flavour == "own-uvloop" else asyncio.DefaultEventLoopPolicy()


@functools.cache
def _trusting(extra_ca_file: str | None) -> ssl.SSLContext:
    # To load the system's roots takes longer than most of these tests.
    return tls_context(extra_ca_file=extra_ca_file)


@pytest.fixture
async def make_transport(flavour: str) -> AsyncIterator[MakeTransport]:
    made: list[httpx.AsyncBaseTransport] = []

    def make(*, extra_ca_file: str | None = None, proxy_url: str | None = None) -> httpx.AsyncBaseTransport:
        context = _trusting(extra_ca_file)
        transport: httpx.AsyncBaseTransport
        if flavour == "httpx":
            transport = httpx.AsyncHTTPTransport(verify=context, proxy=proxy_url)
        else:
            transport = PooledTransport(ssl_context=context, proxy_url=proxy_url)
        made.append(transport)
        return transport

    yield make
    for transport in made:
        await transport.aclose()


@pytest.fixture
def transport(make_transport: MakeTransport) -> httpx.AsyncBaseTransport:
    return make_transport()


@pytest.fixture
def ours(flavour: str, transport: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
    if flavour == "httpx":
        pytest.skip("httpx does otherwise here")
    return transport


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Any) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server
    assert server.failures == []
