"""Requests sent ahead of the answers to those before them, and requests that the parser does not know the words of."""

from __future__ import annotations

import itertools
import json

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, echo
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

GET = b"GET /v1/%d HTTP/1.1\r\nHost: h\r\n\r\n"
RTSP = (
    *("DESCRIBE", "ANNOUNCE", "SETUP", "PLAY", "PAUSE", "TEARDOWN", "GET_PARAMETER", "SET_PARAMETER", "REDIRECT"),
    *("RECORD", "FLUSH"),
)


def send(client: RawClient, data: bytes, part_bytes: int) -> None:
    for at in range(0, len(data), part_bytes):
        client.send(data[at : at + part_bytes])


@pytest.mark.parametrize("part_bytes", [1 << 20, 1000, 61])
@pytest.mark.parametrize("count", [17, 18, 300])
def test_all_are_answered_in_their_order_however_many_are_sent_at_once(
    own_proxy: LiveProxy, upstream: FakeUpstream, count: int, part_bytes: int
) -> None:
    with RawClient(own_proxy) as client:
        send(client, b"".join(GET % number for number in range(count)), part_bytes)
        targets = [json.loads(client.answer().body)["target"] for _ in range(count)]
        client.get("/v1/last")
        assert json.loads(client.answer().body)["target"] == "/v1/last"
    assert targets == [f"/v1/{number}" for number in range(count)]
    assert len(upstream.requests) == count + 1


def test_bodies_among_many_requests_stay_whole(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    bodies = [b"x" * (number * 37 % 3000) for number in range(60)]
    data = b"".join(b"POST /v1/files HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b) for b in bodies)
    with RawClient(own_proxy) as client:
        send(client, data, 1 << 20)
        answered = 0
        while answered < len(bodies):
            answer = client.answer()
            if answer.status == 400:
                break  # it began in the middle of a body: those before it are answered
            assert json.loads(answer.body)["body"].encode() == bodies[answered]
            answered += 1
    assert answered >= 17


@pytest.mark.parametrize("method", [*RTSP, "FROB", "X" * 1000])
@pytest.mark.parametrize("part_bytes", [1 << 20, 7, 1])
def test_any_method_goes_upstream(own_proxy: LiveProxy, upstream: FakeUpstream, method: str, part_bytes: int) -> None:
    head = f"{method} /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n".encode()
    with RawClient(own_proxy) as client:
        send(client, head + b"hi" + GET % 1, part_bytes)
        assert client.answer().status == 200
        assert client.answer().status == 200
    assert [(r.method, r.target, bytes(r.body)) for r in upstream.requests] == [
        (method, "/v1/x", b"hi"),
        ("GET", "/v1/1", b""),
    ]


@pytest.mark.parametrize("method", ["FROB", "PLAY"])
@pytest.mark.parametrize("part_bytes", [1 << 20, 40, 33, 3])
def test_an_unknown_method_behind_another_request_is_answered_with_it(
    own_proxy: LiveProxy, upstream: FakeUpstream, method: str, part_bytes: int
) -> None:
    with RawClient(own_proxy) as client:
        data = GET % 1 + f"{method} /v1/2 HTTP/1.1\r\nHost: h\r\n\r\n".encode() + GET % 3
        send(client, data + f"{method} /v1/4 HTTP/1.1\r\nHost: h\r\n\r\n".encode(), part_bytes)
        assert [client.answer().status for _ in range(4)] == [200] * 4
    methods = ["GET", method, "GET", method]
    assert [(r.method, r.target) for r in upstream.requests] == [(m, f"/v1/{n}") for n, m in enumerate(methods, 1)]


@pytest.mark.parametrize("line", [b"FROB /v1/b HTTP/1.1", "GET /v1/b?é HTTP/1.1".encode()])
@pytest.mark.parametrize("part_bytes", [1 << 20, 5])
def test_what_the_parser_does_not_know_may_stand_behind_the_rest_of_a_body(
    own_proxy: LiveProxy, upstream: FakeUpstream, line: bytes, part_bytes: int
) -> None:
    begun = Gate()

    async def script(exchange: Exchange) -> None:
        begun.open()
        await echo(exchange)

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.send(b"POST /v1/a HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\n\r\nGET ")
        assert begun.wait_in_thread()  # so this part has been read by itself
        send(client, b"/v1/" + line + b"\r\nHost: h\r\n\r\n" + GET % 1, part_bytes)
        assert [client.answer().status for _ in range(3)] == [200, 200, 200]
    method, target, _ = line.decode("latin-1").split(" ")
    assert [(request.method, request.target, bytes(request.body)) for request in upstream.requests] == [
        ("POST", "/v1/a", b"GET /v1/"),
        (method, target, b""),
        ("GET", "/v1/1", b""),
    ]


def test_an_unknown_method_is_found_however_many_heads_have_come_in_two_parts_before_it(
    own_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    requests = GET % 1 + b"FROB /v1/2 HTTP/1.1\r\nHost: h\r\n\r\n" + GET % 3 + b"FROB /v1/4 HTTP/1.1\r\nHost: h\r\n\r\n"
    borders = [0, requests.index(b"/v1/2") + 18, requests.index(b"/v1/3") + 18, len(requests)]
    with RawClient(own_proxy) as client:
        for number, (begin, end) in enumerate(itertools.pairwise(borders), 1):
            client.send(requests[begin:end])
            # Answered when all of this part has been read: the next one is read by itself.
            assert client.answer().status == 200, number
        assert client.answer().status == 200
    assert [request.method for request in upstream.requests] == ["GET", "FROB", "GET", "FROB"]


@pytest.mark.parametrize("part_bytes", [1 << 20, 1])
def test_bytes_beyond_ascii_in_a_target_go_upstream_as_they_came(
    own_proxy: LiveProxy, upstream: FakeUpstream, part_bytes: int
) -> None:
    targets = ["/v1/models?q=é", "/v1/файл/x?é=%C3%A9&é"]
    with RawClient(own_proxy) as client:
        for target in targets:
            send(client, f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode(), part_bytes)
            assert client.answer().status == 200
        client.send("GET /é HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert client.answer().status == 400
    assert [request.target.encode("latin-1").decode() for request in upstream.requests] == targets


@pytest.mark.parametrize("bad", [b"BAD REQUEST LINE\r\n\r\n", b"GET /v1/x HTTP/1.1\r\nHost : h\r\n\r\n"])
def test_what_is_refused_takes_no_earlier_answer_with_it(
    own_proxy: LiveProxy, upstream: FakeUpstream, bad: bytes
) -> None:
    with RawClient(own_proxy) as client:
        client.send(GET % 1 + GET % 2 + bad + GET % 3)
        assert [client.answer().status for _ in range(3)] == [200, 200, 400]
        client.socket.shutdown(1)
        assert client.read_to_end() == b""
    assert len(upstream.requests) == 2
