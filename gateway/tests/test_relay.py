"""The relay, line by line, against the live proxy and a real upstream; each test runs with either transport."""

from __future__ import annotations

import asyncio
import gzip
import json
import queue
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, new_client
from gateway.tests.raw_client import RawClient

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


# What goes up


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


# What comes back


def plays(raw: bytes) -> object:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(raw)

    return script


@pytest.mark.parametrize(
    "status", [200, 201, 202, 301, 302, 307, 400, 401, 403, 404, 409, 422, 429, 499, 500, 503, 529]
)
def test_any_status_passes_with_its_body(proxy: LiveProxy, upstream: FakeUpstream, status: int) -> None:
    body = b'{"error": {"message": "from upstream", "type": "t", "param": null, "code": null}}'
    head = b"HTTP/1.1 %d X\r\nRetry-After: 7\r\nLocation: /v1/y\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    upstream.script = plays(head + body)  # type: ignore[assignment]
    answer = fetch(proxy)
    assert (answer.status_code, answer.content) == (status, body)
    assert (answer.headers["retry-after"], answer.headers["location"]) == ("7", "/v1/y")


def test_blanks_around_a_field_value_are_no_part_of_it(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        client.get("/v1/models", "X-Padded: \t a b \t ", "X-Empty:  ")
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    fields = dict(upstream.requests[0].headers)
    assert (fields["x-padded"], fields["x-empty"]) == ("a b", "")


def test_response_headers_keep_duplicates_and_lose_those_of_the_hop(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 200 OK\r\nLink: a\r\nlink: b\r\nX-Request-Id: req_1\r\nSet-Cookie: __cf_bm=1\r\nAlt-Svc: h3\r\n"
        b"Strict-Transport-Security: max-age=1\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nServer: cloudflare\r\n"
        b"Connection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
    )
    answer = fetch(proxy)
    headers = answer.headers.multi_items()
    assert [value for name, value in headers if name == "link"] == ["a", "b"]
    assert [value for name, value in headers if name == "date"] == ["Thu, 01 Jan 2026 00:00:00 GMT"]
    assert answer.headers["x-request-id"] == "req_1"
    assert answer.headers["server"] == "cloudflare"
    for name in ("set-cookie", "alt-svc", "strict-transport-security", "connection"):
        assert name not in answer.headers


def test_cors_and_server_timing_are_added(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    answer = fetch(proxy, headers={"Origin": "https://app.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["server-timing"].startswith("proxy;dur=")
    assert upstream.requests[0].value("origin") is None


def test_a_preflight_is_answered_here(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    answer = fetch(
        proxy,
        "/v1/chat/completions",
        "OPTIONS",
        headers={
            "Origin": "tauri://localhost",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-lang,openai-beta",
        },
    )
    assert answer.status_code == 204
    assert "content-length" not in answer.headers  # RFC 9110 §8.6
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-lang,openai-beta"
    assert not upstream.requests


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_a_compressed_body_passes_byte_for_byte(proxy: LiveProxy, upstream: FakeUpstream, coding: str) -> None:
    body = gzip.compress(b"x" * 1000) if coding == "gzip" else bytes(range(256))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n" % (coding.encode(), len(body))
    upstream.script = plays(head + body)  # type: ignore[assignment]
    with RawClient(proxy) as client:
        client.get("/v1/models", "Accept-Encoding: gzip, br, zstd")
        answer = client.answer()
    assert answer.body == body
    assert answer.value("content-encoding") == coding
    assert upstream.requests[0].value("accept-encoding") == "gzip, br, zstd"


def test_answers_without_a_body_keep_their_length(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        for method, status, length in [("HEAD", 200, "1234"), ("GET", 304, "5"), ("DELETE", 204, None)]:
            field = f"Content-Length: {length}\r\n" if length else ""
            upstream.script = plays(f"HTTP/1.1 {status} X\r\n{field}ETag: e\r\n\r\n".encode())  # type: ignore[assignment]
            client.request(method, "/v1/files/f/content")
            answer = client.answer(to_head=method == "HEAD")
            assert (answer.status, answer.value("content-length"), answer.body) == (status, length, b"")


def test_interim_answers_are_not_mistaken_for_the_answer(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    )
    answer = fetch(proxy)
    assert (answer.status_code, answer.content) == (200, b"ok")


def test_a_body_that_ends_with_the_connection_passes_whole(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\nabc")
        await exchange.close()

    upstream.script = script
    with RawClient(proxy) as client:
        client.get("/v1/audio/speech")
        answer = client.answer()
    assert (answer.body, answer.end) == (b"abc", "whole")


def test_trailers_do_not_disturb_the_answer(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 9\r\n\r\n"
    )
    with RawClient(proxy) as client:
        for _ in range(2):
            client.get()
            answer = client.answer()
            assert (answer.body, answer.end) == (b"ok", "whole")


def test_trailers_say_nothing_that_a_head_may_not(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
        b"X-Sum: 9\r\nSet-Cookie: a=b\r\nKeep-Alive: 1\r\n\r\n"
    )
    with RawClient(own_proxy) as client:
        client.get()
        client.read_until(b"\r\n\r\n")
        assert client.read_until(b"\r\n\r\n") == b"2\r\nok\r\n0\r\nX-Sum: 9\r\n\r\n"


def test_a_compressed_event_stream_is_not_to_be_held_back_either(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    packed = gzip.compress(b"data: 1\n\n")
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(packed), packed)
    )
    with RawClient(own_proxy) as client:
        client.get("/v1/responses/x?stream=true")
        answer = client.answer()
    assert (answer.value("x-accel-buffering"), answer.body) == ("no", packed)


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_trailers_that_cannot_be_sent_are_left_out(proxy: LiveProxy, upstream: FakeUpstream, version: bytes) -> None:
    framing = (
        b"Content-Length: 2\r\n\r\nok" if version == b"1.1" else b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
    )
    end = b"" if version == b"1.1" else b"X-Sum: 9\r\n\r\n"
    upstream.script = plays(b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\n" + framing + end)  # type: ignore[assignment]
    with RawClient(proxy) as client:
        client.send(b"GET /v1/x HTTP/%b\r\nHost: h\r\n\r\n" % version)
        assert client.answer().body == b"ok"
    assert "out of order" not in proxy.log
    assert "the relay failed" not in proxy.log


def test_an_http_1_0_client_gets_a_body_without_chunks(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.events({"a": 1})
        await exchange.end_stream()

    upstream.script = script
    with RawClient(proxy) as client:
        client.send(b"GET /v1/x HTTP/1.0\r\n\r\n")
        answer = client.answer()
    assert answer.value("transfer-encoding") is None
    assert answer.body == b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    assert answer.end == "closed"


@either_way
def test_pipelined_requests_are_answered_in_order(proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool) -> None:
    connect(proxy, upstream, is_connected)
    with RawClient(proxy) as client:
        client.send(b"".join(b"GET /v1/%d HTTP/1.1\r\nHost: h\r\n\r\n" % number for number in range(5)))
        assert [json.loads(client.answer().body)["target"] for _ in range(5)] == [f"/v1/{n}" for n in range(5)]


# Streams


def test_an_event_arrives_while_the_upstream_still_waits_to_send_the_next(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    client_holds_event_1 = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.events({"number": 1}, done=False)
        await client_holds_event_1.wait()
        await exchange.events({"number": 2})
        await exchange.end_stream()

    upstream.script = script
    with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions", json={"stream": True}) as answer:
        chunks = answer.iter_raw()
        assert next(chunks) == b'data: {"number": 1}\n\n'
        client_holds_event_1.open()
        assert b"".join(chunks) == b'data: {"number": 2}\n\ndata: [DONE]\n\n'
        assert answer.headers["x-accel-buffering"] == "no"


def test_the_head_arrives_before_the_first_event(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    client_holds_head = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await client_holds_head.wait()
        await exchange.events({"number": 1})
        await exchange.end_stream()

    upstream.script = script
    with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions") as answer:
        client_holds_head.open()
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_pieces_end_with_events_however_the_upstream_cuts_them(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    stream = 'data: {"t": "你好😀"}\n\ndata: {"t": "再见"}\n\ndata: [DONE]\n\n'.encode()

    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        for at in range(0, len(stream), 5):
            await exchange.chunk(stream[at : at + 5])
        await exchange.end_stream()

    upstream.script = script
    with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions") as answer:
        pieces = list(answer.iter_raw())
    assert b"".join(pieces) == stream
    assert all(piece.endswith(b"\n\n") for piece in pieces)


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 100"])
def test_a_stream_cut_by_the_upstream_ends_with_an_error_event_and_visibly_cut(
    proxy: LiveProxy, upstream: FakeUpstream, framing: str
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n".encode())
        send = exchange.chunk if "chunked" in framing else exchange.send
        await send(b'data: {"number": 1}\n\n')
        await send('data: {"half": "你'.encode()[:-1])
        exchange.abort()

    upstream.script = script
    with RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        answer = client.answer()
    assert answer.end in ("closed", "reset")
    assert answer.body.startswith(b'data: {"number": 1}\n\n' + 'data: {"half": "你'.encode()[:-1])
    last_event = answer.body.split(b"\n\n")[-2]
    assert last_event.startswith(b"event: error\ndata: ")
    error = json.loads(last_event.removeprefix(b"event: error\ndata: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_any_other_body_cut_by_the_upstream_is_visibly_cut(
    proxy: LiveProxy, upstream: FakeUpstream, framing: str
) -> None:
    body = b"3\r\nabc\r\n" if "chunked" in framing else b"abc"

    async def script(exchange: Exchange) -> None:
        await exchange.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + body)
        await exchange.close()

    upstream.script = script
    with RawClient(proxy) as client:
        client.get()
        answer = client.answer()
    assert answer.body == b"abc"
    assert answer.end in ("closed", "reset")


def test_an_http_1_0_body_cut_by_the_upstream_is_reset(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        exchange.abort()

    upstream.script = script
    with RawClient(proxy) as client:
        client.send(b"GET /v1/x HTTP/1.0\r\n\r\n")
        answer = client.answer()
    assert (answer.body, answer.end) == (b"abc", "reset")


# Either side leaves


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("moment", ["waiting for the first byte", "inside a stream", "inside an upload"])
@either_way
def test_the_client_leaves_and_the_upstream_knows_soon(
    proxy: LiveProxy, upstream: FakeUpstream, moment: str, leave: str, is_connected: bool
) -> None:
    connect(proxy, upstream, is_connected)
    under_way = Gate()

    async def script(exchange: Exchange) -> None:
        if moment == "inside a stream":
            await exchange.read_body()
            await exchange.start_stream()
            await exchange.events({"number": 1}, done=False)
        elif moment == "inside an upload":
            await exchange.read_some_body()
        under_way.open()
        upstream.signals.put(await exchange.wait_until_client_leaves())
        exchange.abort()

    upstream.script = script
    with RawClient(proxy) as client:
        if moment == "inside an upload":
            client.request("POST", "/v1/files", "Content-Length: 100")
            client.send(b"abc")
        else:
            client.request("POST", "/v1/chat/completions", body=b"{}")
        assert under_way.wait_in_thread()
        if moment == "inside a stream":
            client.read_until(b"\n\n")
        if leave == "reset":
            client.reset()
    waited_s = upstream.signals.get(timeout=PATIENCE_S)
    assert isinstance(waited_s, float)
    assert waited_s < LEFT_WITHIN_S


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 502),
        (b"HTTP/1.1 20", 502),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc", 502),
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (2 * MIB) + b"\r\n\r\n", 502),
    ],
    ids=range(8),
)
@either_way
def test_an_upstream_that_leaves_or_talks_nonsense_gives_an_error_in_openais_form(
    proxy: LiveProxy, upstream: FakeUpstream, raw: bytes, status: int, is_connected: bool
) -> None:
    connect(proxy, upstream, is_connected)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(raw)
        await exchange.close()

    upstream.script = script
    answer = fetch(proxy, "/v1/chat/completions", "POST", json={})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["access-control-allow-origin"] == "*"


def test_an_answer_with_two_framings_is_no_answer(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(  # type: ignore[assignment]
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    )
    assert fetch(own_proxy).status_code == 502


def test_an_early_answer_reaches_a_client_that_is_still_uploading(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_some_body()
        await exchange.answer(b'{"error": "too large"}', status="413 Payload Too Large")
        await exchange.wait_until_client_leaves()

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.request("POST", "/v1/files", "Content-Length: 50000000")
        client.send(b"x" * 1000)
        answer = client.answer()
    assert (answer.status, answer.body) == (413, b'{"error": "too large"}')


def test_a_connection_that_the_upstream_closed_while_idle_costs_nobody_a_request(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    for _ in range(5):
        assert fetch(proxy, "/v1/chat/completions", "POST", json={}).status_code == 200
        upstream.drop_idle_connections()
    assert len(upstream.requests) == 5


def test_connections_to_the_upstream_are_reused(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    for _ in range(5):
        fetch(proxy)
    assert len({request.connection for request in upstream.requests}) == 1


# Memory


def growth_bytes(proxy: LiveProxy, before: int) -> int:
    return proxy.worker_rss_bytes() - before


def test_large_bodies_cost_little_memory(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    size = 1024 * MIB
    part = bytes(MIB)

    async def download(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // MIB):
            await exchange.send(part)

    async def upload(exchange: Exchange) -> None:
        received = 0
        while part := await exchange.read_some_body():
            received += len(part)
            exchange.request.body.clear()
        await exchange.answer(b"%d" % received)

    fetch(proxy)
    before = proxy.worker_rss_bytes()
    upstream.script = download
    received = 0
    with new_client() as http, http.stream("GET", f"{proxy.url}/v1/files/f/content", timeout=60) as answer:
        for chunk in answer.iter_raw():
            received += len(chunk)
    assert received == size
    assert growth_bytes(proxy, before) < 20 * MIB

    upstream.script = upload
    with new_client() as client:
        answer = client.post(f"{proxy.url}/v1/files", content=(part for _ in range(size // MIB)))
    assert int(answer.content) == size
    assert growth_bytes(proxy, before) < 20 * MIB


def test_a_client_that_hardly_reads_costs_little_memory_and_stops_the_upstream(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    fetch(proxy)
    before = proxy.worker_rss_bytes()
    stopped = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1024 * MIB))
        sent = 0
        part = bytes(MIB // 4)
        while sent < 1024 * MIB:
            try:
                async with asyncio.timeout(1.0):
                    await exchange.send(part)
            except TimeoutError:
                break
            sent += len(part)
        upstream.signals.put(sent)
        stopped.open()
        exchange.abort()

    upstream.script = script
    with RawClient(proxy) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.get("/v1/files/f/content")
        for _ in range(100):
            client.socket.recv(1)
        assert stopped.wait_in_thread()
        assert growth_bytes(proxy, before) < 20 * MIB
    sent = upstream.signals.get_nowait()
    assert isinstance(sent, int)
    assert sent < 64 * MIB


def test_a_client_that_asks_and_asks_and_never_reads_is_left_waiting(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    body = bytes(MIB // 4)

    async def script(exchange: Exchange) -> None:
        upstream.signals.put("asked")
        await exchange.answer(body)

    upstream.script = script
    with RawClient(proxy) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(256):
            client.send(b"GET /v1/%d HTTP/1.1\r\nHost: h\r\n\r\n" % number)
            try:
                upstream.signals.get(timeout=3)
            except queue.Empty:
                break
    assert 0 < number < 100


# Many at once


def test_many_streams_run_side_by_side_without_mixing(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        body = (await exchange.read_body()).decode()
        await exchange.start_stream()
        await exchange.events(*[f"{body}-{number}" for number in range(5)])
        await exchange.end_stream()

    upstream.script = script

    def one(name: int) -> bool:
        answer = fetch(proxy, "/v1/chat/completions", "POST", content=str(name))
        expected = [f'data: "{name}-{number}"' for number in range(5)]
        return [event for event in answer.text.split("\n\n") if event] == [*expected, "data: [DONE]"]

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(one, range(200)))
