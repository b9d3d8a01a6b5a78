"""What the relay sends up, line by line, against the live proxy and a real upstream, with either transport."""

from __future__ import annotations

import json
import socket

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from gateway.tests.relayed import fetch


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "FROB", "get", "X-1"])
def test_any_method_goes_upstream_as_written(proxy: LiveProxy, upstream: FakeUpstream, method: str) -> None:
    with RawClient(proxy) as client:
        client.request(method, "/v1/anything", body=b"abc")
        answer = json.loads(client.answer().body)
    assert (answer["method"], answer["body"]) == (method, "abc")


@pytest.mark.parametrize("at", range(1, 8))
def test_an_unknown_method_may_arrive_in_parts(proxy: LiveProxy, upstream: FakeUpstream, at: int) -> None:
    request = b"PROPEL /v1/x HTTP/1.1\r\nHost: h\r\n\r\n"
    with RawClient(proxy) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(request[:at])
        # The first part has been read once a second connection has been answered.
        assert fetch(proxy).status_code == 200
        client.send(request[at:])
        assert json.loads(client.answer().body)["method"] == "PROPEL"
        client.get("/v1/next")
        assert json.loads(client.answer().body)["target"] == "/v1/next"


@pytest.mark.parametrize(
    "target",
    [
        "/v1/files/a%2Fb",
        "/v1/x?a=1&a=2&b=+&c=%20&d=%2B",
        "/v1/x;p=1?q;r",
        "/v1/%41?x=%41",
        "/v1/x?",
        "/v1/x?[1]=\"'{}|^`<>",
        "/v1/a/../models",
        "/v1//double",
        "/v1/models?url=https://a.b/?c=d",
        "/v1/" + "x" * 8000,
    ],
)
def test_path_and_query_arrive_byte_for_byte(proxy: LiveProxy, upstream: FakeUpstream, target: str) -> None:
    with RawClient(proxy) as client:
        client.get(target)
        assert client.answer().status == 200
    assert upstream.requests[0].target == target


@pytest.mark.parametrize(
    "target", ["/v1/../admin", "/v1/%2e%2e/admin/", "/admin/../v1/models", "/%76%31/models", "//v1/models"]
)
def test_a_path_that_means_two_things_reaches_nobody(proxy: LiveProxy, upstream: FakeUpstream, target: str) -> None:
    with RawClient(proxy) as client:
        client.get(target)
        answer = client.answer()
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["code"] == "path_refused"
    assert not upstream.requests


@pytest.mark.parametrize(
    "target",
    ["http://evil.example/v1/models?a=1", "https://evil.example:444/v1/models?a=1", "HTTP://u:p@evil/v1/models?a=1"],
)
def test_an_absolute_target_reaches_the_configured_upstream_only(
    proxy: LiveProxy, upstream: FakeUpstream, target: str
) -> None:
    with RawClient(proxy) as client:
        client.get(target)
        assert client.answer().status == 200
    assert upstream.requests[0].target == "/v1/models?a=1"
    assert upstream.requests[0].values("host") == [upstream.url.removeprefix("http://")]


@pytest.mark.parametrize(
    "line", ["CONNECT evil.example:443", "OPTIONS *", "GET evil.example", "GET http://evil.example"]
)
def test_a_target_that_is_no_path_is_refused(proxy: LiveProxy, upstream: FakeUpstream, line: str) -> None:
    with RawClient(proxy) as client:
        client.send(f"{line} HTTP/1.1\r\nHost: evil.example\r\n\r\n".encode())
        assert client.answer().status == 400
    assert not upstream.requests


def test_headers_arrive_without_those_of_this_hop(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        client.get(
            "/v1/models",
            "Authorization: Bearer sk-test",
            "X-A: 1",
            "Cookie: session=1",
            "X-Forwarded-For: 10.0.0.1",
            "Connection: keep-alive, X-Hop",
            "X-Hop: 1",
            "x-a: 2",
        )
        client.answer()
    sent = [(name.lower(), value) for name, value in upstream.requests[0].headers]
    host = upstream.url.removeprefix("http://")
    assert sent == [("host", host), ("authorization", "Bearer sk-test"), ("x-a", "1"), ("x-a", "2")]


def test_a_post_without_a_body_stays_without_one(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        client.request("POST", "/v1/batches/b/cancel")
        assert client.answer().status == 200
        client.request("POST", "/v1/batches/b/cancel", body=b"")
        assert client.answer().status == 200
    assert [request.value("content-length") for request in upstream.requests] == [None, "0"]


def test_an_upload_reaches_the_upstream_part_by_part(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    first_part_seen = Gate()

    async def script(exchange: Exchange) -> None:
        assert await exchange.read_some_body() == b"first"
        first_part_seen.open()
        await exchange.read_body()
        await exchange.answer()

    upstream.script = script
    with RawClient(proxy) as client:
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\nfirst")
        assert first_part_seen.wait_in_thread()
        client.send(b"second")
        assert client.answer().status == 200
    assert upstream.requests[0].body == b"firstsecond"
    assert upstream.requests[0].value("content-length") == "11"


def test_a_chunked_upload_stays_chunked(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        client.send(
            b"POST /v1/files HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"
        )
        assert client.answer().status == 200
        client.get("/v1/next")
        assert client.answer().status == 200
    assert upstream.requests[0].body == b"hello world"
    assert upstream.requests[0].value("transfer-encoding") == "chunked"
    assert upstream.requests[0].value("x-trailer") is None


def test_expect_100_continue_is_answered_here(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        client.request("POST", "/v1/files", "Expect: 100-continue", "Content-Length: 3")
        assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"abc")
        assert client.answer().status == 200
    assert upstream.requests[0].value("expect") is None
    assert upstream.requests[0].body == b"abc"


def test_an_upgrade_that_is_not_taken_is_an_ordinary_request(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    with RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", *upgrade, body=b"{}")
        assert client.answer().status == 200
    assert upstream.requests[0].body == b"{}"
    assert upstream.requests[0].value("upgrade") is None


def test_an_upgrade_that_is_not_taken_changes_nothing_else(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upgrade = ("Connection: close, Upgrade, X-Hop", "Upgrade: h2c", "X-Hop: 1")
    with RawClient(own_proxy) as client:
        client.request("FROB", "/v1/files", *upgrade, body=b"{}")
        answer = client.answer()
        assert answer.value("connection") == "close"
        assert client.read_to_end() == b""
    assert upstream.requests[0].method == "FROB"
    assert upstream.requests[0].value("x-hop") is None


def test_http_1_0_knows_neither_upgrades_nor_interim_answers(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.chunk(b"data: 1\n\n")
        await exchange.end_stream()

    upstream.script = script
    fields = b"Connection: Upgrade\r\nUpgrade: %b\r\nExpect: 100-continue\r\nContent-Length: 2\r\n"
    for protocol in (b"h2c", b"websocket"):
        with RawClient(own_proxy) as client:
            client.send(b"POST /v1/files HTTP/1.0\r\n" + fields % protocol + b"\r\n{}")
            head = client.read_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert client.read_to_end() == b"data: 1\n\n"


def test_a_websocket_handshake_is_held_to_the_rules_of_requests(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    fields = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    fields += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    for hosts in ("", "Host: a\r\nHost: b\r\n"):
        with RawClient(own_proxy) as client:
            client.send(f"GET /v1/realtime HTTP/1.1\r\n{hosts}{fields}\r\n".encode())
            assert client.answer().status == 400
    assert not upstream.requests
