"""What the relay expects of a transport: proxies on the way to the upstream."""

from __future__ import annotations

import asyncio
import queue
import ssl

import httpx2 as httpx
import pytest

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S, MakeTransport, fetch, read, request_to
from gateway.tests.egress_proxies import ConnectProxy, EgressProxy, Socks5Proxy
from gateway.tests.fake_upstream import FakeUpstream


class TestEgressProxies:
    @pytest.fixture(params=[ConnectProxy, Socks5Proxy])
    def kind(self, request: pytest.FixtureRequest) -> type[EgressProxy]:
        kind: type[EgressProxy] = request.param
        return kind

    @pytest.mark.parametrize("user", ["", "ann"])
    async def test_tls_goes_through_with_the_name_unresolved(
        self,
        make_transport: MakeTransport,
        kind: type[EgressProxy],
        ca_file: str,
        server_tls: ssl.SSLContext,
        user: str,
    ) -> None:
        with FakeUpstream(tls=server_tls) as upstream, kind(user=user, password="s:e cret") as proxy:
            url = proxy.url(password="s%3Ae%20cret")
            for scheme in {"http": ["http"], "socks5": ["socks5", "socks5h"]}[kind.scheme]:
                transport = make_transport(
                    extra_ca_file=ca_file, proxy_url=url.replace(f"{kind.scheme}:", f"{scheme}:")
                )
                target = f"https://localhost:{upstream.port}"
                for _ in range(2):
                    response = await transport.handle_async_request(request_to(target))
                    assert response.status_code == 200
                    await read(response)
                assert proxy.asked_for.pop() == ("localhost", upstream.port)
                assert proxy.asked_for == []

    async def test_plain_http_goes_through_ours(
        self,
        ours: httpx.AsyncBaseTransport,
        make_transport: MakeTransport,
        kind: type[EgressProxy],
        upstream: FakeUpstream,
    ) -> None:
        with kind() as proxy:
            assert (await fetch(make_transport(proxy_url=proxy.url()), upstream))[0] == 200
            assert proxy.asked_for == [("127.0.0.1", upstream.port)]

    async def test_a_wrong_password_is_a_proxy_error(
        self, make_transport: MakeTransport, kind: type[EgressProxy]
    ) -> None:
        with kind(user="ann", password="right") as proxy:
            transport = make_transport(proxy_url=proxy.url(password="wrong"))
            with pytest.raises(httpx.ProxyError):
                await transport.handle_async_request(request_to("https://localhost:1"))

    async def test_no_proxy_there_is_a_connect_error(
        self, make_transport: MakeTransport, kind: type[EgressProxy]
    ) -> None:
        transport = make_transport(proxy_url=f"{kind.scheme}://127.0.0.1:1")
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(request_to("https://localhost:1"))

    async def test_leaving_a_proxy_that_never_answers_closes_its_connection(
        self, ours: httpx.AsyncBaseTransport, make_transport: MakeTransport, kind: type[EgressProxy]
    ) -> None:
        here: queue.Queue[str] = queue.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(65536):
                here.put("here")
            here.put("left")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        proxy_url = f"{kind.scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        transport = make_transport(proxy_url=proxy_url)
        with pytest.raises(httpx.ConnectTimeout):
            await transport.handle_async_request(request_to("https://localhost:1", timeouts={"connect": 1.0}))
        assert await asyncio.to_thread(here.get, True, PATIENCE_S) == "here"
        assert await asyncio.to_thread(here.get, True, LEFT_WITHIN_S) == "left"
        server.close()
