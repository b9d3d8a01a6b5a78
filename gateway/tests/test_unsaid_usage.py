"""What an upstream does not say: a request's usage, its tier, that it goes on in the background."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from billing.events import Usage, UsageEvent
from gateway.metering import Metering
from gateway.request_meter import RequestMeter
from gateway.seen_request import MOST_HELD_BYTES
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import CHAT, USAGE, Ledger, chunk, post
from gateway.tests.raw_client import RawClient
from gateway.usage import LongBody

PRICED = "SELECT service_tier, pricing, cost_usd FROM billing_usagerecord ORDER BY started_at, event_id"
_PADDING = b" " * (4 << 20)


async def stream_without_usage(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.start_stream()
    await exchange.events(chunk("Hello there, how are you?"))
    await exchange.end_stream()


@pytest.mark.parametrize("place", ["before", "between", "behind"])
def test_a_body_too_long_to_be_held_is_estimated_all_the_same(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, place: str
) -> None:
    upstream.script = stream_without_usage
    content = b'"messages":[{"role":"user","content":"%b"}]' % (b"some words " * 1000)
    padding = {name: _PADDING if name == place else b"" for name in ("before", "between", "behind")}
    body = b'{%b"model":"gpt-4o-mini",%b,%b"stream":true%b}' % (
        padding["before"],
        content,
        padding["between"],
        padding["behind"],
    )
    metered.post(
        "/v1/chat/completions",
        content=body,
        headers={"Authorization": "Bearer sk-long", "Content-Type": "application/json"},
    )
    assert bytes(upstream.requests[0].body) == body
    record = ledger.new()[0]
    assert record[1:5] == ("gpt-4o-mini-2024-07-18", 200, "completed", "estimated")
    assert record[5] == pytest.approx(2700, rel=0.1)  # a token for 4 bytes; the padding is no text
    assert record[7] > 0
    assert record[10]


@pytest.mark.parametrize(
    "count", [b"-5", b"12.5", b'"12"', b"true", b"NaN", b"1000000000001", b"9007199254740992", b"9" * 40]
)
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_whose_counts_cannot_be_is_estimated(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, name: str, count: bytes, is_stream: bool
) -> None:
    usage = json.dumps(USAGE).encode().replace(b'"%b": ' % name.encode(), b'"%b": %b, "x": ' % (name.encode(), count))
    said = chunk("Hello there, how are you?") if is_stream else {"choices": [{"message": {"content": "Hello there"}}]}
    last = b'{"model": "gpt-4o-mini-2024-07-18", "usage": %b, ' % usage

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        if not is_stream:
            await exchange.answer(last + json.dumps(said).encode()[1:])
            return
        await exchange.start_stream()
        await exchange.events(said, done=False)
        await exchange.chunk(b"data: " + last + b'"choices": []}\n\ndata: [DONE]\n\n')
        await exchange.end_stream()

    upstream.script = script
    assert post(metered, {**CHAT, "stream": is_stream}).status_code == 200
    record = ledger.new()[0]
    assert record[1:5] == ("gpt-4o-mini-2024-07-18", 200, "completed", "estimated")
    assert 0 < record[5] < 50
    assert 0 < record[7] < 50
    ((least,),) = metered.rows("SELECT min(input_tokens + output_tokens) FROM billing_usageday")
    assert least >= 0


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_an_answer_that_is_nothing_but_a_failure_has_used_nothing(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, path: str, is_stream: bool
) -> None:
    error = {"message": "The server had an error", "type": "server_error"}
    reply: dict[str, object] = {"error": error}
    if path == "/v1/responses":
        response = {"id": "resp_1", "object": "response", "model": "gpt-5", "status": "failed", "error": error}
        reply = {"type": "response.failed", "response": response} if is_stream else response

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        if not is_stream:
            await exchange.answer(json.dumps(reply | {"usage": None}).encode())
            return
        await exchange.start_stream()
        await exchange.events(reply, done=False)
        await exchange.end_stream()

    upstream.script = script
    assert metered.post(path, json={"model": "gpt-5", "input": "Hi", "stream": is_stream}).status_code == 200
    assert ledger.new()[0][2:8] == (200, "completed", "none", 0, 0, 0)


def test_the_facts_of_a_long_body_stand_at_either_end() -> None:
    for part_bytes in (1000, 65_536, 1 << 20):
        body = LongBody()
        text = b'{ "model" : "gpt-4o" , "input" : "%b" , "stream":true,"n":3 }' % (b"word " * 1_000_000)
        for at in range(0, len(text), part_bytes):
            body.feed(text[at : at + part_bytes])
        facts = body.facts()
        assert (facts.model, facts.is_stream, facts.choices) == ("gpt-4o", True, 3)
        assert body.tokens == pytest.approx(len(text) / 4, rel=0.05)


def test_data_in_a_long_body_is_no_text() -> None:
    body = LongBody()
    image = b"iVBORw0KGgo" * 1_000_000
    text = b'{"model":"gpt-4o","messages":[{"content":[{"image_url":{"url":"data:image/png;base64,%b"}}]}]}' % image
    for at in range(0, len(text), 65_536):
        body.feed(text[at : at + 65_536])
    assert body.tokens < 1000


@pytest.mark.parametrize("asked", ["flex", "batch", "made-up", "default"])
def test_a_tier_that_the_upstream_does_not_confirm_makes_nothing_cheaper(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, asked: str
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(json.dumps({"model": "gpt-4o-2024-08-06", "usage": USAGE}).encode())

    upstream.script = script
    post(metered, CHAT | {"model": "gpt-4o"})
    post(metered, CHAT | {"model": "gpt-4o", "service_tier": asked})
    ledger.new(2)
    without, with_tier = metered.rows(PRICED)[-2:]
    assert without == with_tier
    assert without[:2] == ("", "priced")


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/responses"])
def test_a_wish_for_the_background_that_the_upstream_ignores_hides_no_usage(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, target: str
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(json.dumps({"model": "gpt-4o-mini", "output": [{"text": "Hello"}]}).encode())

    upstream.script = script
    post(metered, {"model": "gpt-4o-mini", "input": "Hi", "messages": [], "background": True}, target)
    assert ledger.new()[0][4] == "estimated"


@pytest.mark.parametrize(
    ("target", "body", "pricing", "source"),
    [
        ("/v1/images/generations", {"model": "gpt-image-1", "prompt": "A cat"}, "unpriced", "none"),
        ("/v1/audio/speech", {"model": "tts-1", "input": "Hello", "voice": "alloy"}, "priced", "estimated"),
    ],
)
def test_who_leaves_before_the_answer_begins_has_not_used_it_for_nothing(
    metered: LiveProxy,
    upstream: FakeUpstream,
    ledger: Ledger,
    target: str,
    body: dict[str, object],
    pricing: str,
    source: str,
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        upstream.signals.put("asked")
        await exchange.wait_until_client_leaves()

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", target, "Content-Type: application/json", body=json.dumps(body).encode())
        assert upstream.signals.get(timeout=60) == "asked"
    record = ledger.new()[0]
    assert record[2:5] == (0, "client_closed", source)
    assert metered.rows(PRICED)[-1][1] == pricing


def test_a_stream_in_packed_events_is_written_down_before_its_client_sees_the_end(upstream: FakeUpstream) -> None:
    released = asyncio.Event()
    events = b"".join(
        b"data: %b\n\n" % json.dumps(payload).encode() for payload in (chunk("Hello"), chunk(usage=USAGE))
    )

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream(headers=(("content-type", "text/event-stream"), ("content-encoding", "gzip")))
        await exchange.chunk(gzip.compress(events + b"data: [DONE]\n\n"))
        await released.wait()
        await exchange.end_stream()

    upstream.script = script
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1") as proxy, RawClient(proxy) as client:
        body = json.dumps(CHAT | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=body)
        client.read_until(gzip.compress(events + b"data: [DONE]\n\n")[-8:])
        assert proxy.wait_for_rows("SELECT usage_source FROM billing_usagerecord", 1)[0] == ("upstream",)
        upstream.loop.call_soon_threadsafe(released.set)
        client.read_until(b"0\r\n\r\n")


def test_a_usage_event_whose_choices_are_null_is_taken_out_again(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello"), chunk(usage=USAGE) | {"choices": None})
        await exchange.end_stream()

    upstream.script = script
    answer = post(metered, CHAT | {"stream": True})
    assert b"usage" not in answer.content
    assert ledger.new()[0][4] == "upstream"


# How a body goes up


def test_an_upstream_may_answer_before_any_of_the_body_has_come(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.answer(b'{"error": {}}', status="413 Content Too Large")
        exchange.abort()

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.send(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert client.answer().status == 413


def test_a_body_of_an_unknown_kind_on_an_unknown_route_is_not_held_up(proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        upstream.signals.put(await exchange.read_some_body())
        await exchange.read_body()
        await exchange.answer()

    upstream.script = script
    head = (
        b"POST /v1/anything HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 6\r\n\r\n"
    )
    with RawClient(proxy) as client:
        client.send(head + b"abc")
        assert upstream.signals.get(timeout=60) == b"abc"
        client.send(b"def")
        assert client.answer().status == 200


# What is held for an estimate


class _Guesses:
    """Says whether a body was there to be counted, and what was guessed of one that was not."""

    async def estimate(self, *, request_body: bytes | None, input_guess: int = 0, **_: object) -> Usage:
        return Usage(input_tokens=input_guess, output_tokens=len(request_body or b""))


async def test_bodies_that_wait_for_their_answers_are_held_within_bounds_together() -> None:
    events: list[UsageEvent] = []
    metering = Metering(pepper=b"p" * 32, journal=events, estimates=_Guesses())
    scope = {"method": "POST", "raw_path": b"/v1/responses", "headers": []}
    body = b'{"model":"gpt-4o","input":"%b"}' % (b"word " * 800_000)

    def asked() -> RequestMeter:
        meter = metering.begin(scope)
        assert meter.seen.take_whole(body) == body
        meter.look()
        return meter

    meters = [asked() for _ in range(MOST_HELD_BYTES // len(body) + 3)]
    for meter in reversed(meters):
        await meter.finish("client_closed")
    held = [event for event in events if event.usage.output_tokens]
    assert len(held) == MOST_HELD_BYTES // len(body)
    assert [event.usage.input_tokens for event in events if event not in held] == [
        pytest.approx(1_000_000, rel=0.05)
    ] * 3
    assert {(event.model, event.usage_source) for event in events} == {("gpt-4o", "estimated")}
    assert metering.held_bytes == 0
