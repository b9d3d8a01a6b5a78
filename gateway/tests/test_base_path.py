"""An upstream whose address has a path: it stands before /v1, for that upstream only."""

from __future__ import annotations

import pytest
from websockets.sync.client import connect

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy


@pytest.mark.parametrize("transport", ["own", "httpx"])
def test_a_path_of_the_upstreams_address_is_not_the_sandboxs(upstream: FakeUpstream, transport: str) -> None:
    with LiveProxy(
        UPSTREAM_URL=f"{upstream.url}/openai/", SANDBOX_ENABLED="true", UPSTREAM_TRANSPORT=transport
    ) as proxy:
        assert proxy.get("/v1/models?x=1").json()["target"] == "/openai/v1/models?x=1"
        practised = proxy.get("/v1/models", headers={"authorization": "Bearer sk-sandbox"})
        assert practised.json()["object"] == "list"
        protocols = ["realtime", "openai-insecure-api-key.sk-sandbox"]
        url = f"ws://127.0.0.1:{proxy.port}/v1/realtime?model=m"
        with connect(url, subprotocols=protocols) as session:  # type: ignore[arg-type]
            assert '"session.created"' in str(session.recv())
    assert [request.target for request in upstream.requests] == ["/openai/v1/models?x=1"]
