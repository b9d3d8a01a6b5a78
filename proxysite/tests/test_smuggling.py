"""Requests that two readers could read differently, and any other bytes from a client."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
        HEAD + b"Content-Length: +3\r\n\r\nabc",
        HEAD + b"Content-Length: -3\r\n\r\nabc",
        HEAD + b"Content-Length: 0x3\r\n\r\nabc",
        HEAD + b"Content-Length:\r\n\r\n",
        HEAD + b"Content-Length: 000000000000000000003\r\n\r\nabc",
        HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"X-A: b\r\n folded: c\r\n\r\n",
        HEAD + b"X-A: b\r\n\tfolded\r\n\r\n",
        HEAD + b"X-A: b\nX-B: c\r\n\r\n",
        HEAD + b"X-A: b\rX-B: c\r\n\r\n",
        HEAD + b"X-A: b\0c\r\n\r\n",
        HEAD + b"X-A : b\r\n\r\n",
        HEAD + b" X-A: b\r\n\r\n",
        HEAD + b": b\r\n\r\n",
        HEAD + b"Host: other\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
        b"POST /v1/x HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /v1/x HTTP/1.1\r\n\r\n",
        b"GET /v1/x HTTP/1.1\nHost: h\n\n",
        b"GET /v1/\x01 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v1/x#fragment HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v1/x HTTP/2.0\r\nHost: h\r\n\r\n",
        b"GET /v1/x HTTP/9.9\r\nHost: h\r\n\r\n",
        b"DESCRIBE /v1/x RTSP/1.0\r\nHost: h\r\n\r\n",
        b"PLAY /v1/x RTSP/1.1\r\nHost: h\r\n\r\n",
        b"FROB /v1/x RTSP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v1/x y HTTP/1.1\r\nHost: h\r\n\r\n",
        b"G\x80T /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"(GET) /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls hello",
        b"A" * 2000 + b" /v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
)
def test_a_request_that_two_readers_could_read_differently_is_refused(
    own_proxy: LiveProxy, upstream: FakeUpstream, request_bytes: bytes
) -> None:
    with RawClient(own_proxy) as client:
        client.send(request_bytes)
        answer = client.answer()
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
        assert answer.value("connection") == "close"
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
    assert not any(request.complete for request in upstream.requests)


def test_bytes_behind_a_refused_request_are_not_a_request(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(own_proxy) as client:
        client.send(HEAD + b"X : y\r\n\r\nGET /v1/smuggled HTTP/1.1\r\nHost: h\r\n\r\n")
        assert client.answer().status == 400
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
    assert not upstream.requests


def test_an_unknown_method_behind_another_request_repeats_nothing(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(own_proxy) as client:
        client.send(HEAD + b"Content-Length: 2\r\n\r\n{}FROB /v1/x HTTP/1.1\r\nHost: h\r\n\r\n")
        assert [client.answer().status for _ in range(2)] == [200, 200]
    assert [(request.method, bytes(request.body)) for request in upstream.requests] == [("POST", b"{}"), ("FROB", b"")]


_SOUP = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            *(b"GET ", b"POST ", b"FROB ", b"/v1/models ", b"%2e%2e/", b"HTTP/1.1\r\n", b"\r\n", b"\0"),
            *(b"Host: h\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n"),
            *(b"0\r\n\r\n", b"Connection: upgrade\r\n", b"Upgrade: websocket\r\n", b"Upgrade: h2c\r\n"),
            *(b"Expect: 100-continue\r\n", b"Sec-WebSocket-Key: x\r\n", b"Sec-WebSocket-Version: 13\r\n"),
        ]
    ),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(_SOUP, min_size=1, max_size=12), st.integers(1, 40))
def test_the_worker_outlives_any_bytes(own_proxy: LiveProxy, soup: list[bytes], split: int) -> None:
    pids = own_proxy.worker_pids
    data = b"".join(soup)
    with RawClient(own_proxy) as client:
        try:
            for at in range(0, len(data), split):
                client.send(data[at : at + split])
        except ConnectionError:
            pass
    assert own_proxy.get("/healthz").status_code == 200
    assert own_proxy.worker_pids == pids
    assert "the application failed" not in own_proxy.log
    assert "Traceback" not in own_proxy.log, own_proxy.log[-3000:]
