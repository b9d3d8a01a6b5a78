"""Every request in the ledger once, with what it used: the live proxy, a real upstream, the database behind it."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import CHAT, USAGE, Ledger, answer_json, chunk, post
from gateway.tests.raw_client import RawClient


def test_a_whole_answer_is_recorded_with_its_buckets(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    upstream.script = answer_json
    post(metered)
    expected = ("gpt-4o-mini-2024-07-18", 200, "completed", "upstream", 60, 40, 30, 10, "req_up", False)
    assert ledger.new() == [("/v1/chat/completions", *expected)]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read_from_a_copy(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, coding: str
) -> None:
    plain = json.dumps({"model": "m", "usage": USAGE}).encode()
    packed = gzip.compress(plain) if coding == "gzip" else zlib.compress(plain)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(packed, headers=(("content-type", "application/json"), ("content-encoding", coding)))

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=json.dumps(CHAT).encode())
        assert client.answer().body == packed
    assert ledger.new()[0][4:8] == ("upstream", 60, 40, 30)


async def stream_as_asked(exchange: Exchange) -> None:
    """Answer as OpenAI does: usage only where it was asked for."""
    request = json.loads(await exchange.read_body())
    asked = (request.get("stream_options") or {}).get("include_usage")
    nothing_yet = {"usage": None} if asked else {}
    await exchange.start_stream()
    await exchange.events(chunk("Hel", **nothing_yet), chunk("lo", **nothing_yet), done=False)
    if asked:
        await exchange.events(chunk(usage=USAGE), done=False)
    await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.end_stream()


def test_a_stream_that_did_not_ask_for_usage_is_metered_and_looks_as_if_nobody_had(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    upstream.script = stream_as_asked
    body = CHAT | {"stream": True}
    answer = post(metered, body)
    sent = json.loads(upstream.requests[0].body)
    assert sent == body | {"stream_options": {"include_usage": True}}
    expected = [chunk("Hel"), chunk("lo")]
    events = [event for event in answer.text.split("\n\n") if event]
    assert [json.loads(event.removeprefix("data: ")) for event in events[:-1]] == expected
    assert events[-1] == "data: [DONE]"
    assert ledger.new()[0][2:9] == (200, "completed", "upstream", 60, 40, 30, 10)


def test_a_stream_that_asked_for_usage_gets_it(metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger) -> None:
    upstream.script = stream_as_asked
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    answer = post(metered, body)
    assert json.loads(upstream.requests[0].body) == body
    assert '"total_tokens": 130' in answer.text
    assert ledger.new()[0][4:8] == ("upstream", 60, 40, 30)


def test_a_spliced_stream_of_a_known_length_still_arrives_whole(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    events = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in (chunk("Hi"), chunk(usage=USAGE))]

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(b"".join(events) + b"data: [DONE]\n\n", headers=(("content-type", "text/event-stream"),))

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
        answer = client.answer()
    assert (answer.body, answer.end) == (events[0] + b"data: [DONE]\n\n", "whole")
    assert ledger.new()[0][2:8] == (200, "completed", "upstream", 60, 40, 30)


def test_a_compressed_stream_that_was_spliced_arrives_unpacked(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        stream = b"".join(
            b"data: " + json.dumps(event).encode() + b"\n\n" for event in (chunk("Hi"), chunk(usage=USAGE))
        )
        packed = gzip.compress(stream + b"data: [DONE]\n\n")
        headers = (("content-type", "text/event-stream"), ("content-encoding", "gzip"))
        await exchange.start_stream(headers=headers)
        for at in range(0, len(packed), 7):
            await exchange.chunk(packed[at : at + 7])
        await exchange.end_stream()

    upstream.script = script
    answer = post(metered, CHAT | {"stream": True})
    assert "content-encoding" not in answer.headers
    assert answer.text == f"data: {json.dumps(chunk('Hi'))}\n\ndata: [DONE]\n\n"
    assert ledger.new()[0][4:8] == ("upstream", 60, 40, 30)


def test_a_compressed_stream_that_was_spliced_and_breaks_off_looks_cut(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    event = b"data: " + json.dumps(chunk("Hi")).encode() + b"\n\n"

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH)
        # Without a length and not in chunks: what ends with the connection has no framing that shows a cut.
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\r\n"
        await exchange.send(head + packed)
        await exchange.close()

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
        answer = client.answer()
    assert answer.end == "closed"
    assert answer.body.startswith(event + b"event: error\ndata: ")
    assert ledger.new()[0][2:5] == (200, "upstream_error", "estimated")


@pytest.mark.parametrize(
    "body", [b'{"stream": true', b"\xff\xfe", b'{"stream": true, "stream_options": null}', b"[]", b'{"stream": "true"}']
)
def test_a_body_that_cannot_be_asked_for_usage_passes_as_it_is(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, body: bytes
) -> None:
    metered.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert upstream.requests[0].body == body
    ledger.new()


def test_an_upstream_that_reports_nothing_is_estimated(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello "), chunk("there, friend"))
        await exchange.end_stream()

    upstream.script = script
    post(metered, CHAT | {"stream": True})
    record = ledger.new()[0]
    assert record[3:5] == ("completed", "estimated")
    assert 5 <= record[5] <= 30
    assert 2 <= record[7] <= 8


@pytest.mark.parametrize("status", ["401 Unauthorized", "429 Too Many", "500 Oops"])
def test_errors_of_the_upstream_are_completed_requests_that_used_nothing(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, status: str
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(b'{"error": {}}', status=status)

    upstream.script = script
    post(metered)
    record = ledger.new()[0]
    assert record[2:9] == (int(status.split()[0]), "completed", "none", 0, 0, 0, 0)
