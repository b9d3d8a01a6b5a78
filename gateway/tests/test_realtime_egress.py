"""Ways of a WebSocket to its upstream: over TLS, through egress proxies, and those that lead nowhere."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from websockets.asyncio.server import ServerConnection

from gateway.tests.egress_proxies import ConnectProxy, EgressProxy, Socks5Proxy
from gateway.tests.fake_realtime import MIB, RealtimeUpstream, echo
from gateway.tests.fake_upstream import hanging_up
from gateway.tests.live import LiveProxy, free_port
from gateway.tests.sockets import LIMIT, dial, end_of, error_code, refusal, settled


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_upstream(authority: trustme.CA) -> Iterator[RealtimeUpstream]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with RealtimeUpstream(tls=context) as server:
        yield server


@pytest.mark.parametrize(
    ("make", "scheme"), [(None, ""), (ConnectProxy, "http"), (Socks5Proxy, "socks5"), (Socks5Proxy, "socks5h")]
)
async def test_the_upstream_is_reached_over_tls_and_through_egress_proxies(
    tls_upstream: RealtimeUpstream,
    authority: trustme.CA,
    tmp_path: Path,
    make: type[EgressProxy] | None,
    scheme: str,
) -> None:
    pushed = 0

    async def script(websocket: ServerConnection) -> None:
        nonlocal pushed
        assert await websocket.recv() == "t" * LIMIT
        await websocket.send("u" * LIMIT)
        for _ in range(100):
            await websocket.send(b"b" * MIB)
            pushed += 1
        await websocket.close(4000, "up")

    tls_upstream.play(script)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    with make(user="user", password="secret") if make else contextlib.nullcontext() as egress:
        live = LiveProxy(
            UPSTREAM_URL=tls_upstream.url,
            UPSTREAM_CA_FILE=str(ca_file),
            UPSTREAM_PROXY=egress.url(scheme) if egress else "",
            HTTPS_PROXY="http://127.0.0.1:9",
            ALL_PROXY="http://127.0.0.1:9",
        )
        with live:
            async with dial(live, max_queue=1) as client:
                await client.send("t" * LIMIT)
                assert await client.recv() == "u" * LIMIT
                assert await settled(lambda: pushed) < 90
                assert [len(await client.recv()) for _ in range(100)] == [MIB] * 100
                assert await end_of(client) == (4000, "up")
    assert tls_upstream.requests[0].headers.get_all("host") == [f"localhost:{tls_upstream.port}"]
    if egress:
        assert egress.asked_for == [("localhost", tls_upstream.port)]


async def test_a_certificate_that_nobody_vouches_for_is_a_502(tls_upstream: RealtimeUpstream) -> None:
    tls_upstream.play(echo)
    with LiveProxy(UPSTREAM_URL=tls_upstream.url) as live:
        response = await refusal(live)
    assert (response.status_code, error_code(response)) == (502, "upstream_unreachable")
    assert not tls_upstream.requests


async def test_an_egress_proxy_that_is_not_there_is_a_502_without_its_address(upstream: RealtimeUpstream) -> None:
    port = free_port()
    with LiveProxy(UPSTREAM_URL=upstream.url, UPSTREAM_PROXY=f"http://user:secret@127.0.0.1:{port}") as live:
        response = await refusal(live)
        assert "secret" not in live.log
    assert (response.status_code, error_code(response)) == (502, "upstream_unreachable")
    assert str(port).encode() not in bytes(response.body)


async def test_an_upstream_that_cannot_be_connected_to_is_a_504_or_a_502() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with LiveProxy(UPSTREAM_URL=address, CONNECT_TIMEOUT_SECONDS="0.3") as lost:
            late = await refusal(lost)
            silent.close()
            gone = await refusal(lost)
    assert (late.status_code, error_code(late)) == (504, "upstream_timeout")
    assert (gone.status_code, error_code(gone)) == (502, "upstream_unreachable")


async def test_an_upstream_that_hangs_up_before_tls_is_a_502() -> None:
    with hanging_up() as port, LiveProxy(UPSTREAM_URL=f"https://127.0.0.1:{port}") as proxy:
        for _ in range(3):
            response = await refusal(proxy)
            assert (response.status_code, error_code(response)) == (502, "upstream_unreachable")
            assert proxy.get("/v1/models").status_code == 502
        assert "Traceback" not in proxy.log
