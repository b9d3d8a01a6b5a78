"""What comes back through the relay, line by line, from a real upstream to a client, with either transport."""

from __future__ import annotations

import gzip
import json

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from gateway.tests.relayed import connect, either_way, fetch, plays


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


@either_way
@pytest.mark.parametrize(
    "framing", [b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize(
    "line",
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 200 Fine so far",
        b"HTTP/1.1 299 So\tSo",
        b"HTTP/1.1 299 ",
        b"HTTP/1.1 413 Payload Too Large",
        b"HTTP/1.1 413 Content Too Large",
        b"HTTP/1.1 429 \xe8\xaf\xb7\xe6\xb1\x82 \xff",
        b"HTTP/1.1 529 Site is overloaded",
    ],
)
def test_the_phrase_of_a_status_passes(
    proxy: LiveProxy, upstream: FakeUpstream, is_connected: bool, line: bytes, framing: bytes
) -> None:
    connect(proxy, upstream, is_connected)
    upstream.script = plays(line + b"\r\n" + framing)  # type: ignore[assignment]
    with RawClient(proxy) as client:
        client.get()
        answer = client.answer()
        assert answer.raw.split(b"\r\n")[0] == line
        assert (answer.body, answer.end) == (b"{}", "whole")
        upstream.script = plays(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")  # type: ignore[assignment]
        client.get()
        assert client.answer().raw.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("phrase", [b"a\0b", b"\x1b[2J", b"\x7f", b"a\x0bb", b"a\x80\x01"])
@pytest.mark.parametrize(("status", "usual"), [(200, b"OK"), (529, b"")])
def test_a_phrase_that_no_client_should_see_is_the_usual_one(
    own_proxy: LiveProxy, upstream: FakeUpstream, phrase: bytes, status: int, usual: bytes
) -> None:
    upstream.script = plays(b"HTTP/1.1 %d %b\r\nContent-Length: 0\r\n\r\n" % (status, phrase))  # type: ignore[assignment]
    with RawClient(own_proxy) as client:
        client.get()
        assert client.answer().raw.split(b"\r\n")[0] == b"HTTP/1.1 %d %b" % (status, usual)


def test_an_answer_of_our_own_has_the_usual_phrase(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = plays(b"HTTP/1.1 099 Mine\r\n\r\n")  # type: ignore[assignment]
    with RawClient(proxy) as client:
        client.get()
        assert client.answer().raw.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")


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
