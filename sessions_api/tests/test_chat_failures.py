"""Calls that fail at the upstream, or whose client hangs up, through a live proxy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import PATIENCE_S, LiveProxy
from gateway.tests.raw_client import RawClient
from sessions_api.tests.conversations import (
    API_KEY,
    EMPTY,
    PATH,
    WHOLE_TURN,
    chunk,
    cut,
    parsed_events,
    remember,
    say,
    sent_up,
    sibling,
    stored,
)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "429 Slow", "500 Oh"])
def test_an_error_of_the_upstreams_comes_with_its_own_message(
    chat_proxy: LiveProxy, upstream: FakeUpstream, status: str, is_stream: bool
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        headers = (("content-type", "application/json"), ("retry-after", "7"), ("x-request-id", "req_1"))
        body = {"error": {"message": "Not like this: 不行", "code": "rate_limit_exceeded"}}
        await exchange.answer(json.dumps(body).encode(), status=status, headers=headers)

    upstream.script = script
    answer = say(chat_proxy, "hello", stream=is_stream)
    code = int(status[:3])
    assert answer.status_code == code
    assert answer.json() == {"code": code, "message": "Not like this: 不行", "data": None}
    assert (answer.headers["retry-after"], answer.headers["x-request-id"]) == ("7", "req_1")
    assert stored(chat_proxy) == EMPTY


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"choices": [7]}', b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("status", ["200 OK", "503 Away", "302 Found"])
def test_an_upstream_that_makes_no_sense_is_a_failure(
    chat_proxy: LiveProxy, upstream: FakeUpstream, status: str, body: bytes
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(body, status=status)

    upstream.script = script
    answer = say(chat_proxy, "hello")
    assert answer.status_code == answer.json()["code"] == (503 if status[:3] == "503" else 502)
    assert stored(chat_proxy) == EMPTY


async def end_early(exchange: Exchange) -> None:
    """End a stream in an orderly way, but without its last events."""
    await exchange.read_body()
    await exchange.start_stream()
    await exchange.events(chunk("Hal"), done=False)
    await exchange.end_stream()


async def fail_in_stream(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.start_stream()
    await exchange.events(chunk("Hal"), {"error": {"message": "The model broke."}})
    await exchange.end_stream()


def test_a_cut_answer_is_a_failure(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = cut
    answer = say(chat_proxy, "hello")
    assert answer.status_code == answer.json()["code"] == 502
    assert stored(chat_proxy) == EMPTY


@pytest.mark.parametrize("script", [cut, end_early, fail_in_stream])
def test_a_cut_stream_ends_with_an_error_and_without_a_clean_end(
    chat_proxy: LiveProxy, upstream: FakeUpstream, script: Any
) -> None:
    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "x", "stream": True}).encode()
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        answer = client.answer()
    assert answer.end == "closed"
    assert [(name, envelope["code"], envelope["data"]) for name, envelope in parsed_events(answer.body)] == [
        ("message", 200, "Hal"),
        ("error", 502, None),
    ]
    assert stored(chat_proxy) == EMPTY


def test_an_upstream_that_is_not_there_is_a_502(chat_proxy: LiveProxy) -> None:
    with sibling(chat_proxy, UPSTREAM_URL="http://127.0.0.1:9") as proxy:
        answer = say(proxy, "hello")
    assert answer.json() == {"code": 502, "message": "无法连接上游", "data": None}


def test_a_silent_upstream_is_a_504(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.wait_until_client_leaves()

    upstream.script = script
    with sibling(chat_proxy, FIRST_BYTE_TIMEOUT_SECONDS="0.5") as proxy:
        answer = say(proxy, "hello")
    assert answer.json() == {"code": 504, "message": "上游响应超时", "data": None}
    assert stored(chat_proxy) == EMPTY


def test_a_failed_turn_leaves_what_was_there(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    say(chat_proxy, "hello")
    upstream.script = cut
    assert say(chat_proxy, "lost").status_code == 502
    assert stored(chat_proxy) == WHOLE_TURN
    upstream.script = remember
    say(chat_proxy, "again")
    assert [content for _, content in sent_up(upstream)] == ["hello", "1: hello!", "again"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_hangs_up_ends_the_turn(chat_proxy: LiveProxy, upstream: FakeUpstream, is_stream: bool) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        if is_stream:
            await exchange.start_stream()
            await exchange.events(chunk("Hal"), done=False)
        upstream.signals.put("asked")
        await exchange.wait_until_client_leaves()
        upstream.signals.put("left")

    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "x", "stream": is_stream}).encode()
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        assert upstream.signals.get(timeout=PATIENCE_S) == "asked"
    assert upstream.signals.get(timeout=PATIENCE_S) == "left"
    upstream.script = remember
    assert say(chat_proxy, "hello").json()["data"] == "1: hello!"
    assert stored(chat_proxy) == WHOLE_TURN
