"""One record of each request, however it ends, and what is read on for whom has left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest

from billing.events import UsageEvent
from gateway.asgi import Message
from gateway.errors import ResponseCutError
from gateway.estimation import Estimator
from gateway.metering import Metering
from gateway.relay import Relay, RelayLimits
from gateway.tests.calls import until
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import CHAT, RECORDS, USAGE, Ledger, chunk
from gateway.tests.raw_client import RawClient
from gateway.transport import PooledTransport, tls_context

RECORDED = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in (chunk("Hello"), chunk(usage=USAGE)))
RECORDED += b"data: [DONE]\n\n"


@pytest.mark.slow
def test_one_record_wherever_the_upstream_cuts(metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger) -> None:
    wire = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire += b"%x\r\n%b\r\n0\r\n\r\n" % (len(RECORDED), RECORDED)
    cuts = range(0, len(wire) + 1)
    at = iter(cuts)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        cut = next(at)
        await exchange.send(wire[:cut])
        if cut < len(wire):
            await exchange.close()

    upstream.script = script
    for _ in cuts:
        with RawClient(metered) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            client.answer()
    outcomes = [record[3] for record in ledger.new(len(cuts))]
    assert set(outcomes) == {"upstream_error", "completed"}
    assert outcomes[-1] == "completed"
    reported = [record for record in metered.rows(RECORDS)[-len(cuts) :] if record[4] == "upstream"]
    assert all(record[5:8] == (60, 40, 30) for record in reported)
    assert reported


@pytest.mark.slow
def test_one_record_wherever_the_client_leaves(metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        for at in range(0, len(RECORDED), 16):
            await exchange.chunk(RECORDED[at : at + 16])
            await asyncio.sleep(0)
        await exchange.end_stream()

    upstream.script = script
    cuts = range(0, len(RECORDED) + 200, 3)
    for cut in cuts:
        with RawClient(metered) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            received = 0
            while received < cut and (data := client.socket.recv(min(64, cut - received))):
                received += len(data)
            if cut % 2:
                client.reset()
    assert {record[3] for record in ledger.new(len(cuts))} <= {"client_closed", "completed"}


def test_a_client_that_leaves_may_be_read_on_for(upstream: FakeUpstream) -> None:
    left = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello"), done=False)
        upstream.signals.put("sent")
        await left.wait()
        await exchange.events(chunk(usage=USAGE))
        await exchange.end_stream()

    upstream.script = script
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1", ON_CLIENT_DISCONNECT="drain") as proxy:
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            client.read_until(b"Hello")
        # The proxy has seen the client leave once it has answered another.
        assert proxy.get("/healthz").status_code == 200
        upstream.loop.call_soon_threadsafe(left.set)
        record = proxy.wait_for_rows(RECORDS, 1)[0]
    assert record[2:8] == (200, "client_closed", "upstream", 60, 40, 30)


def test_an_answer_that_comes_whole_after_its_client_has_left_may_be_read_on_for(upstream: FakeUpstream) -> None:
    left = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        upstream.signals.put("asked")
        await left.wait()
        await exchange.answer(json.dumps({"model": "gpt-4o-mini", "usage": USAGE}).encode())

    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1", ON_CLIENT_DISCONNECT="drain") as proxy:
        assert proxy.get("/v1/models").status_code == 200  # leaves a connection to ask on
        upstream.script = script
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b"{}")
            assert upstream.signals.get(timeout=60) == "asked"
        assert proxy.get("/healthz").status_code == 200
        upstream.loop.call_soon_threadsafe(left.set)
        record = proxy.wait_for_rows(RECORDS, 2)[1]
    assert record[2:8] == (200, "client_closed", "upstream", 60, 40, 30)


@pytest.mark.parametrize("policy", ["cancel", "drain"])
def test_what_was_never_sent_has_used_nothing(policy: str) -> None:
    with socket.socket() as full, contextlib.ExitStack() as stack:
        # A listener with a full backlog: connection attempts hang.
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            attempt = stack.enter_context(socket.socket())
            attempt.setblocking(False)
            attempt.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with LiveProxy(UPSTREAM_URL=url, JOURNAL_FLUSH_SECONDS="0.1", ON_CLIENT_DISCONNECT=policy) as proxy:
            with RawClient(proxy) as client:
                body = json.dumps(CHAT).encode()
                client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=body)
                assert proxy.get("/healthz").status_code == 200
            record = proxy.wait_for_rows(RECORDS, 1)[0]
    assert record[2:8] == (0, "client_closed", "none", 0, 0, 0)


def test_no_more_is_read_on_for_a_client_that_has_left_than_allowed(upstream: FakeUpstream) -> None:
    left, piece = asyncio.Event(), chunk("Hello " * 2000)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello"), done=False)
        await left.wait()
        for _ in range(8000):
            await exchange.events(piece, done=False)
        await exchange.events(chunk(usage=USAGE))
        await exchange.end_stream()

    upstream.script = script
    policy = {"ON_CLIENT_DISCONNECT": "drain", "DRAIN_MAX_BYTES": "100000"}
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1", **policy) as proxy:
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            client.read_until(b"Hello")
        assert proxy.get("/healthz").status_code == 200
        upstream.loop.call_soon_threadsafe(left.set)
        assert proxy.wait_for_rows(RECORDS, 1)[0][3] == "client_closed"
        [(read,)] = proxy.rows("SELECT response_bytes FROM billing_usagerecord")
    # And what had been read when the bound was met: at most as much as the transport holds.
    assert 100_000 < read < 1_000_000


async def finish_without_usage(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.start_stream()
    finished = chunk("Yes", choices=[{"index": 0, "delta": {"content": "Yes"}, "finish_reason": "stop"}])
    await exchange.events(finished, done=False)


def leave_behind_the_finish(proxy: LiveProxy, **options: object) -> None:
    """Returns when the proxy has seen its client leave: it has answered another, who was there before."""
    body = json.dumps({**CHAT, "stream": True, **options}).encode()
    with RawClient(proxy) as other:
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=body)
            client.read_until(b'"stop"')
        other.request("GET", "/healthz")
        assert other.answer().status == 200


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}], ids=["spliced", "asked"])
def test_who_leaves_when_only_the_usage_is_missing_saves_nothing(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, options: dict[str, object]
) -> None:
    async def script(exchange: Exchange) -> None:
        await finish_without_usage(exchange)
        await left.wait()
        await exchange.events(chunk(usage=USAGE, choices=[]))
        await exchange.end_stream()

    left = asyncio.Event()
    upstream.script = script
    leave_behind_the_finish(metered, **options)
    upstream.loop.call_soon_threadsafe(left.set)
    assert ledger.new()[0][2:8] == (200, "client_closed", "upstream", 60, 40, 30)


def test_an_upstream_that_never_says_its_usage_is_left_soon(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await finish_without_usage(exchange)
        await exchange.wait_until_client_leaves()

    upstream.script = script
    leave_behind_the_finish(metered)
    assert ledger.new()[0][2:5] == (200, "client_closed", "estimated")


def test_what_is_refused_here_is_recorded_as_refused(metered: LiveProxy, ledger: Ledger) -> None:
    with RawClient(metered) as client:
        client.request("POST", "/v1/files", "Content-Length: 99999999999")
        assert client.answer().status == 413
    assert ledger.new()[0][2:5] == (413, "refused", "none")


async def test_one_event_however_often_a_request_is_cancelled(upstream: FakeUpstream) -> None:
    async def begin_to_stream(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.events(chunk("Hello"), done=False)
        await exchange.wait_until_client_leaves()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    upstream.script = begin_to_stream
    events: list[UsageEvent] = []
    metering = Metering(pepper=b"pepper", journal=events, estimates=Estimator())
    transport = PooledTransport(ssl_context=tls_context(extra_ca_file=None))
    relay = Relay(upstream_url=upstream.url, transport=transport, limits=RelayLimits(), metering=metering)
    scope = {
        "type": "http",
        "method": "GET",
        "target": b"/v1/models",
        "raw_path": b"/v1/models",
        "headers": [(b"host", b"h")],
        "on_disconnect": lambda callback: None,
    }
    for times in range(1, 6):
        sent: list[Message] = []
        passing = asyncio.create_task(relay(scope, receive, send))
        await until(lambda: len(sent) > 1)  # noqa: B023 - asked within this turn
        for _ in range(times):  # in one turn of the loop after the other
            passing.cancel()
            await asyncio.sleep(0)
        with contextlib.suppress(asyncio.CancelledError, ResponseCutError):
            await passing
        assert len(events) == times
    await transport.aclose()
