"""Trailers: an answer's pass, announced or not; a request's are dropped, and so is their announcement."""

from __future__ import annotations

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

ENDED = b"0\r\nX-Sum: 9\r\n\r\n"


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (b"", b"2\r\nok\r\n"),
        (b"Trailer: X-Sum\r\n", b"2\r\nok\r\n"),
        (b"Content-Type: text/event-stream\r\n", b"9\r\ndata: 1\n\n\r\n"),
        (b"", b""),
    ],
)
def test_trailers_pass_whether_they_were_announced_or_not(
    own_proxy: LiveProxy, upstream: FakeUpstream, fields: bytes, body: bytes, in_pieces: bool
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        answer = b"HTTP/1.1 200 OK\r\n" + fields + b"Transfer-Encoding: chunked\r\n\r\n" + body + ENDED
        for at in range(0, len(answer), 1 if in_pieces else len(answer)):
            await exchange.send(answer[at : at + (1 if in_pieces else len(answer))])

    upstream.script = script
    with RawClient(own_proxy) as client:
        for _ in range(2):
            client.get()
            answer = client.answer()
            assert answer.end == "whole"
            assert answer.value("x-sum") == "9"


def test_what_announces_a_requests_trailers_is_dropped_with_them(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with RawClient(proxy) as client:
        client.send(
            b"POST /v1/files HTTP/1.1\r\nHost: h\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"5\r\nhello\r\n" + ENDED
        )
        assert client.answer().status == 200
    assert upstream.requests[0].body == b"hello"
    assert upstream.requests[0].value("trailer") is None
    assert upstream.requests[0].value("x-sum") is None
