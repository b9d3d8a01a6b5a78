"""A small body that does not come with its head, nor right behind it."""

from __future__ import annotations

import signal
import socket

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, wait_until
from gateway.tests.raw_client import RawClient

_HEAD = ("Content-Length: 12", "Content-Type: text/plain", "Authorization: Bearer sk-late-0123456789abcdef")
_LEFT = "SELECT outcome FROM billing_usagerecord WHERE endpoint = '/v1/uploads/{upload_id}/parts'"


def test_a_request_goes_up_while_its_body_is_late(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    begun = Gate()

    async def script(exchange: Exchange) -> None:
        begun.open()
        await exchange.answer(await exchange.read_body())

    upstream.script = script
    with RawClient(proxy) as client:
        client.request("POST", "/v1/uploads", *_HEAD)
        assert begun.wait_in_thread()
        client.send(b"late ")
        client.send(b"but all")
        assert client.answer().body == b"late but all"


def test_a_request_whose_body_comes_in_pieces_goes_up_once(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    before = len(upstream.requests)
    with RawClient(proxy) as client:
        for _ in range(3):
            client.request("POST", "/v1/uploads", *_HEAD)
            for part in (b"piece ", b"by ", b"pi", b"e"):
                assert proxy.get("/healthz").status_code == 200  # so what was sent has been read
                client.send(part)
            assert b"piece by pie" in client.answer().body
    assert len(upstream.requests) == before + 3


def test_who_leaves_before_its_body_has_come_is_recorded_and_nobody_asked(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    before = len(upstream.requests)
    with RawClient(proxy) as client:
        client.request("POST", "/v1/uploads/late/parts", *_HEAD)
        client.send(b"half")
        assert proxy.get("/healthz").status_code == 200
    wait_until(lambda: proxy.rows(_LEFT) == [("client_closed",)])
    assert len(upstream.requests) == before


def test_a_stop_tells_who_has_yet_to_send_a_body_that_nothing_comes_of_it() -> None:
    with LiveProxy(GRACEFUL_TIMEOUT_SECONDS="1") as proxy:
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", *_HEAD)
            assert proxy.get("/healthz").status_code == 200
            assert proxy.process is not None
            proxy.process.send_signal(signal.SIGTERM)
            answer = client.answer()
        assert answer.status == 503
        assert b"restarting" in answer.body


@pytest.mark.parametrize(
    "answer",
    [
        b"Content-Length: 2\r\n\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_an_answer_ahead_of_its_request_s_body_says_that_the_connection_ends(
    own_proxy: LiveProxy, upstream: FakeUpstream, answer: bytes
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n" + answer)
        await exchange.wait_until_client_leaves()

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.request("POST", "/v1/files", "Content-Length: 1000000")
        client.send(b"x" * 100_000)
        told = client.answer()
        assert (told.status, told.end, told.value("connection")) == (200, "whole", "close")
        client.socket.shutdown(socket.SHUT_WR)
        assert client.read_to_end() == b""
