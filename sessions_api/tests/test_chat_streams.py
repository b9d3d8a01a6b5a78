"""Streamed answers of the call, through a live proxy."""

from __future__ import annotations

import json

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from sessions_api.tests.conversations import (
    API_KEY,
    PATH,
    WHOLE_TURN,
    chunk,
    completion,
    events_of,
    parsed_events,
    say,
    sent_up,
    stored,
)


def test_pieces_arrive_while_the_upstream_still_speaks(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hel"), done=False)
        await gate.wait()
        await exchange.events(chunk("lo"), chunk(finish_reason="stop"))
        await exchange.end_stream()

    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "x", "stream": True}).encode()
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        head = client.read_until(b"\r\n\r\n").decode()
        assert client.read_until(b"\n\n").endswith('data: {"code":200,"message":"执行成功","data":"Hel"}\n\n'.encode())
        gate.open()
        rest = client.read_until(b"0\r\n\r\n")
    assert "text/event-stream" in head
    assert "x-accel-buffering: no" in head
    assert parsed_events(rest.replace(b"\r\n", b"\n")) == [
        ("message", {"code": 200, "message": "执行成功", "data": "lo"}),
        ("done", {"code": 200, "message": "执行成功", "data": None}),
    ]


def test_a_streamed_turn_is_remembered(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    events = events_of(say(chat_proxy, "hello there", stream=True))
    assert "".join(envelope["data"] for name, envelope in events if name == "message") == "1: hello there!"
    assert events[-1][0] == "done"
    assert json.loads(talking.requests[0].body)["stream_options"] == {"include_usage": True}
    say(chat_proxy, "and now?")
    assert sent_up(talking)[:2] == [("user", "hello there"), ("assistant", "1: hello there!")]


@pytest.mark.parametrize("asks_for_stream", [False, True])
def test_an_upstream_that_does_the_opposite_is_understood(
    chat_proxy: LiveProxy, upstream: FakeUpstream, asks_for_stream: bool
) -> None:
    async def opposite(exchange: Exchange) -> None:
        if json.loads(await exchange.read_body()).get("stream"):
            await exchange.answer(completion("Hi there"))
            return
        await exchange.start_stream()
        await exchange.events(chunk("Hi "), chunk("there"), chunk(finish_reason="stop"))
        await exchange.end_stream()

    upstream.script = opposite
    answer = say(chat_proxy, "hello", stream=asks_for_stream)
    assert answer.status_code == 200
    if asks_for_stream:
        told = [(name, event["data"]) for name, event in events_of(answer)]
        assert told == [("message", "Hi there"), ("done", None)]
    else:
        assert answer.json() == {"code": 200, "message": "执行成功", "data": "Hi there"}
    assert stored(chat_proxy) == WHOLE_TURN


def test_a_character_cut_into_two_events_arrives_whole(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        for half in ("\\ud83d", "\\ude00"):
            await exchange.chunk(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % half.encode())
        await exchange.events(chunk(finish_reason="stop"))
        await exchange.end_stream()

    upstream.script = script
    events = events_of(say(chat_proxy, "smile", stream=True))
    assert [envelope["data"] for _, envelope in events] == ["😀", None]
