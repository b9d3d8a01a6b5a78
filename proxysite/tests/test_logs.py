"""What the logs of a running proxy hold, and what they never hold."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import PATIENCE_S, LiveProxy
from gateway.tests.raw_client import RawClient
from proxysite.logs import JsonFormatter, LineFormatter, current_request_id, redacted

KEY = "sk-test-grep-0123456789-for-this-key"
SECRET = "grep-for-this-body"
CHAT = {"model": "gpt-4o-mini", "stream": True, "messages": [{"role": "user", "content": SECRET}]}


@pytest.fixture(scope="module")
def _talking(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url,
        SANDBOX_ENABLED="true",
        LOG_FORMAT="json",
        LOG_LEVEL="DEBUG",
        ACCESS_LOG="true",
        FIRST_BYTE_TIMEOUT_SECONDS="2",
        SILENCE_TIMEOUT_SECONDS="2",
        MAX_BODY_BYTES="100000",
    ) as proxy:
        yield proxy


@pytest.fixture
def talking(_talking: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    """A proxy that logs as much as it can, as JSON."""
    return _talking


def entries(proxy: LiveProxy) -> list[dict[str, Any]]:
    return [json.loads(line) for line in proxy.log.splitlines()]


def accesses(proxy: LiveProxy, request_id: str) -> list[dict[str, Any]]:
    found = [entry for entry in entries(proxy) if entry["logger"] == "gateway.access"]
    return [entry for entry in found if entry["request_id"] == request_id]


def access(proxy: LiveProxy, request_id: str) -> dict[str, Any]:
    """Return the line of a request once it is there: its client may have the whole answer before."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := accesses(proxy, request_id)):
        assert time.monotonic() < deadline, proxy.log[-3000:]
        time.sleep(0.02)
    return found[0]


def test_every_line_is_an_object_gunicorns_too(talking: LiveProxy) -> None:
    found = entries(talking)
    assert {"gunicorn.error", "uvicorn.error"} <= {entry["logger"] for entry in found}
    assert all({"time", "level", "logger", "process", "message"} <= entry.keys() for entry in found)
    assert all(entry["time"].endswith("Z") for entry in found)


def test_an_ended_request_is_one_line_with_its_route_and_ids(talking: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.answer(b"{}", headers=(("x-request-id", "req_up"),))

    upstream.script = script
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "client-7"}
    answer = talking.get(f"/v1/files/secret-file?apiKey={KEY}", headers=headers)
    assert answer.headers["x-request-id"] == "req_up"
    line = access(talking, answer.headers["x-proxy-request-id"])
    assert (line["method"], line["route"]) == ("GET", "/v1/files/{file_id}")
    assert (line["status"], line["outcome"], line["response_bytes"]) == (200, "completed", 2)
    assert (line["upstream_request_id"], line["client_request_id"]) == ("req_up", "client-7")
    assert line["key"] == "sk-…-key"
    assert upstream.requests[0].value("x-request-id") == "client-7"


def test_our_id_stands_in_for_one_that_the_upstream_does_not_give(talking: LiveProxy) -> None:
    answer = talking.get("/v1/models")
    assert answer.headers["x-request-id"] == answer.headers["x-proxy-request-id"]


def test_a_failure_is_logged_under_the_id_that_the_client_was_told(talking: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = _vanish
    answer = talking.get("/v1/models")
    request_id = answer.headers["x-proxy-request-id"]
    assert (answer.status_code, answer.headers["x-request-id"]) == (502, request_id)
    warnings = [entry for entry in entries(talking) if entry["level"] == "WARNING"]
    assert [entry["request_id"] for entry in warnings if entry["logger"] == "gateway.relay"][-1] == request_id
    record = "SELECT outcome FROM billing_usagerecord WHERE event_id = '{}'"
    assert talking.wait_for_rows(record.format(request_id), 1) == [("upstream_error",)]


def test_ids_differ_and_do_not_count_requests(talking: LiveProxy) -> None:
    ids = [talking.get("/v1/models").headers["x-proxy-request-id"] for _ in range(4)]
    assert len(set(ids)) == 4
    tails = [int(request_id[-8:], 16) for request_id in ids]
    assert [b - a for a, b in itertools.pairwise(tails)] != [1, 1, 1]


@pytest.mark.parametrize("sent", [f"x-{KEY}-x", "a b", "é", "x" * 101])
def test_an_odd_request_id_of_a_client_is_not_logged(talking: LiveProxy, sent: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}".encode(), "X-Request-Id": sent.encode("latin-1")}
    answer = talking.get("/v1/models", headers=headers)
    assert access(talking, answer.headers["x-proxy-request-id"])["client_request_id"] == ""


# Failures of every kind


async def _vanish(exchange: Exchange) -> None:
    await exchange.read_body()
    exchange.abort()


async def _echo_as_garbage(exchange: Exchange) -> None:
    body = await exchange.read_body()
    await exchange.send(b"%b %b\r\n\r\n" % (body, KEY.encode()))
    await exchange.close()


async def _echo_in_a_field(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.send(b"HTTP/1.1 200 OK\r\n%b %b: x\r\n\r\n" % (SECRET.encode(), KEY.encode()))


async def _echo_as_a_broken_chunk(exchange: Exchange) -> None:
    body = await exchange.read_body()
    await exchange.start_stream()
    await exchange.send(b"%b\r\n" % body)
    await exchange.close()


async def _echo_as_a_broken_stream(exchange: Exchange) -> None:
    body = await exchange.read_body()
    await exchange.start_stream()
    await exchange.chunk(b"data: %b %b\n\ndata: {" % (body, KEY.encode()))
    exchange.abort()


async def _echo_as_broken_gzip(exchange: Exchange) -> None:
    body = await exchange.read_body()
    await exchange.start_stream(headers=(("content-type", "text/event-stream"), ("content-encoding", "gzip")))
    await exchange.chunk(body)
    await exchange.end_stream()


async def _echo_as_an_error(exchange: Exchange) -> None:
    body = await exchange.read_body()
    await exchange.answer(b'{"error": {"message": "Incorrect API key: %b"}}%b' % (KEY.encode(), body), status="401 No")


async def _say_nothing(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.wait_until_client_leaves()


async def _stop_in_the_middle(exchange: Exchange) -> None:
    body = await exchange.read_body()
    await exchange.start_stream()
    await exchange.chunk(b"data: %b\n\n" % body)
    await exchange.wait_until_client_leaves()


FAILURES = [
    _vanish,
    _echo_as_garbage,
    _echo_in_a_field,
    _echo_as_a_broken_chunk,
    _echo_as_a_broken_stream,
    _echo_as_broken_gzip,
    _echo_as_an_error,
    _say_nothing,
    _stop_in_the_middle,
]


def leave_after(proxy: LiveProxy, *lines: str, body: bytes) -> None:
    """Send a request with its key and leave in the middle of its body or answer."""
    with RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", f"Authorization: Bearer {KEY}", *lines)
        client.send(body)
        client.reset()


async def refused_sockets(proxy: LiveProxy) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    url = proxy.url.replace("http", "ws")
    for target in (f"/v1/realtime?model={SECRET}&apiKey={KEY}", f"/pro?apiKey={KEY}", "/v1/%2e%2e/x"):
        protocols: Any = ["realtime", f"openai-insecure-api-key.{KEY}"]
        try:
            async with connect(url + target, subprotocols=protocols, proxy=None, open_timeout=60) as socket:
                await socket.send(SECRET)
        except (WebSocketException, OSError):
            pass


def test_no_key_and_no_body_is_logged_whatever_fails(talking: LiveProxy, upstream: FakeUpstream) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for failure in FAILURES:
        upstream.script = failure
        with RawClient(talking) as client:
            body = json.dumps(CHAT).encode()
            lines = (f"Authorization: Bearer {KEY}", "Content-Type: application/json", "Connection: close")
            client.request("POST", f"/v1/chat/completions?apiKey={KEY}", *lines, body=body)
            client.read_to_end()
    upstream.script = _say_nothing
    for target in (f"/pro/balance?apiKey={KEY}", f"/{KEY}?{SECRET}", f"/v1/../{KEY}", f"/v1/models/{KEY}"):
        talking.get(target, headers=headers)
    talking.post("/v1/files", headers=headers, content=SECRET * 10_000)  # more than MAX_BODY_BYTES
    talking.request("POST", f"/admin/login/?next={KEY}", headers=headers, data={"username": KEY, "password": SECRET})
    leave_after(talking, "Content-Length: 1000", body=SECRET.encode())
    leave_after(talking, "Transfer-Encoding: chunked", body=SECRET.encode() + b"\r\n")
    with RawClient(talking) as client:
        client.send(f"{SECRET} {KEY}\r\n{KEY}\r\n\r\n".encode())
        client.read_to_end()
    asyncio.run(refused_sockets(talking))
    upstream.script = _echo_as_an_error
    last = talking.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert access(talking, last.headers["x-proxy-request-id"])
    log = talking.log
    assert "gateway.relay" in log
    for secret in (KEY, KEY[3:], SECRET):
        assert secret not in log, next(line for line in log.splitlines() if secret in line)
    assert all(json.loads(line) for line in log.splitlines())


# The formatters


def record_of(message: str, *arguments: object, fields: dict[str, object] | None = None) -> logging.LogRecord:
    record = logging.LogRecord("a.b", logging.WARNING, "x.py", 1, message, arguments, None)
    if fields:
        record.fields = fields
    return record


def test_a_record_is_one_line_whatever_it_says() -> None:
    record = record_of("first\nsecond \r\n\x1b[31m%s", "third", fields={"route": "/v1\nx"})
    line = LineFormatter().format(record)
    assert line.endswith("WARNING a.b: first second  [31mthird route=/v1 x")
    assert "\n" not in JsonFormatter().format(record)


def test_a_request_in_progress_is_named() -> None:
    token = current_request_id.set("id-1")
    try:
        assert LineFormatter().format(record_of("x")).endswith("a.b: x request_id=id-1")
        assert json.loads(JsonFormatter().format(record_of("x")))["request_id"] == "id-1"
    finally:
        current_request_id.reset(token)


def test_a_traceback_stands_in_the_record() -> None:
    try:
        raise ValueError(f"Bearer {KEY}")
    except ValueError:
        record = record_of("failed")
        record.exc_info = sys.exc_info()
    entry = json.loads(JsonFormatter().format(record))
    assert "ValueError" in entry["exception"]
    assert KEY not in entry["exception"]
    assert "ValueError" in LineFormatter().format(record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Incorrect API key: sk-proj-abcdefghij.", "Incorrect API key: sk-…."),
        ("hint sk-…abcd stays", "hint sk-…abcd stays"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
        ("GET /pro/balance?apiKey=abc&x=1", "GET /pro/balance?apiKey=…&x=1"),
        ("realtime, openai-insecure-api-key.abc, x", "realtime, openai-insecure-api-key.…, x"),
        ("postgres://user:word@host/db", "postgres://…@host/db"),
        ("task-runner and risk-assessment-done", "task-runner and risk-assessment-done"),
        ("a message about bearer", "a message about bearer"),
    ],
)
def test_secrets_are_taken_out_of_any_text(text: str, expected: str) -> None:
    assert redacted(text) == expected
