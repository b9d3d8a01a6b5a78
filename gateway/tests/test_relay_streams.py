"""Streams through the relay: event by event, cut, and many at once, with either transport."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, new_client
from gateway.tests.raw_client import RawClient
from gateway.tests.relayed import fetch


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


def test_the_error_event_stands_apart_from_an_event_that_was_too_long_to_wait_for(
    proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    begun = b'data: {"number": 1}\n\ndata: ' + b"x" * (1 << 20)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.chunk(begun)
        await exchange.close()  # with nothing unread: a reset would overtake bytes that are on their way

    upstream.script = script
    with RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        answer = client.answer()
    assert answer.body.startswith(begun + b"\n\nevent: error\ndata: {")
    assert answer.end in ("closed", "reset")


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
