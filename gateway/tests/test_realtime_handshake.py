"""The handshake of a WebSocket through the live proxy, line by line, both ways."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.datastructures import Headers
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.utils import accept_key

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S
from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, raw_answer
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from gateway.tests.sockets import (
    KEY,
    RawSocket,
    dial,
    error_code,
    errors_in,
    refusal,
    secrets_in,
    server_frame,
    shake_hands,
)


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture
def proxy(echoing_proxy: LiveProxy) -> LiveProxy:
    return echoing_proxy


# The handshake, upwards


@pytest.mark.parametrize(
    "target",
    [
        "/v1/realtime?model=gpt-realtime",
        "/v1/responses",
        "/v1/files/a%2Fb?a=1&a=2&b=+&c=%20&d=%2B;e",
        "/v1/x;p=1?q;r",
        "/v1/x?",
        "/v1/%41?x=%41&u=https://a.b/?c=d",
        "/v1/a/../realtime?[1]=\"'{}|^`<>",
    ],
)
async def test_path_and_query_arrive_byte_for_byte(proxy: LiveProxy, upstream: RealtimeUpstream, target: str) -> None:
    with RawSocket(proxy, target) as client:
        client.opened()
    assert [request.path for request in upstream.requests] == [target]


async def test_a_target_in_absolute_form_goes_where_its_path_says(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    with RawSocket(proxy, "http://elsewhere.example/v1/realtime?model=m") as client:
        client.opened()
    (request,) = upstream.requests
    assert (request.path, request.headers["host"]) == ("/v1/realtime?model=m", upstream.url.removeprefix("http://"))


@pytest.mark.parametrize("offers", [["h2c, websocket"], ["h2c", "websocket"], ["websocket", "h2c"], ["WebSocket,"]])
async def test_a_websocket_may_be_one_offer_of_several(
    proxy: LiveProxy, upstream: RealtimeUpstream, offers: list[str]
) -> None:
    with RawClient(proxy) as client:
        fields = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
        client.request("GET", "/v1/realtime", "Connection: Upgrade", *(f"Upgrade: {one}" for one in offers), *fields)
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    assert [request.headers.get_all("upgrade") for request in upstream.requests] == [["websocket"]]


@pytest.mark.parametrize(
    "field",
    [
        "Authorization: Bearer sk-sandbox",
        "Authorization: Basic OnNrLXNhbmRib3g=",
        "Authorization: sk-sandbox",
        "api-key: sk-sandbox",
        "x-api-key: sk-sandbox",
    ],
)
async def test_the_sandbox_answers_to_its_key_in_whichever_field(
    proxy: LiveProxy, upstream: RealtimeUpstream, field: str
) -> None:
    with RawSocket(proxy, "/v1/realtime?model=m", field) as client:
        client.opened()
        assert b'"session.created"' in client.next_but_pings()[1]
    assert not upstream.requests


async def test_headers_arrive_without_those_of_this_hop(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    sent = [
        ("Authorization", f"Bearer {KEY}"),
        ("OpenAI-Beta", "realtime=v1"),
        ("X-Twice", "1"),
        ("X-Twice", "2"),
        ("Cookie", "a=b"),
        ("Origin", "https://app.example"),
        ("X-Forwarded-For", "10.1.2.3"),
        ("X-Hop", "1"),
        ("Connection", "X-Hop"),
        ("Content-Length", "0"),
    ]
    async with dial(proxy, additional_headers=sent, user_agent_header=None, compression="deflate"):
        pass
    arrived = sorted((name.lower(), value) for name, value in upstream.requests[0].headers.raw_items())
    arrived = [(name, value) for name, value in arrived if name != "sec-websocket-key"]
    assert arrived == [
        ("authorization", f"Bearer {KEY}"),
        ("connection", "Upgrade"),
        ("host", upstream.url.removeprefix("http://")),
        ("openai-beta", "realtime=v1"),
        ("sec-websocket-version", "13"),
        ("upgrade", "websocket"),
        ("x-twice", "1"),
        ("x-twice", "2"),
    ]


@pytest.mark.parametrize("chosen", ["realtime", "openai-beta.realtime-v1", None])
async def test_subprotocols_go_up_in_order_and_the_choice_comes_back(
    proxy: LiveProxy, upstream: RealtimeUpstream, chosen: str | None
) -> None:
    upstream.select = chosen
    offers = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1"]
    async with dial(proxy, subprotocols=[Subprotocol(offer) for offer in offers]) as client:
        assert client.subprotocol == chosen
    assert upstream.requests[0].headers.get_all("sec-websocket-protocol") == [", ".join(offers)]


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/admin/", 404, "unknown_url"),
        ("/v2/realtime", 404, "unknown_url"),
        ("/v1x", 404, "unknown_url"),
        ("http://evil.example/v2/realtime", 404, "unknown_url"),
        ("/v1/../admin", 400, "path_refused"),
        ("/v1/%2e%2e/admin", 400, "path_refused"),
        ("/v1/realtime#x", 400, "bad_request"),
    ],
)
async def test_a_path_that_is_not_v1_is_refused(
    proxy: LiveProxy, upstream: RealtimeUpstream, target: str, status: int, code: str
) -> None:
    with RawSocket(proxy, target) as client:
        answer = client.answer()
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)
    assert answer.value("access-control-allow-origin") == "*"
    assert not upstream.requests


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        ("X-Long: " + "x" * 70_000, 431, "headers_too_large"),
        ("\r\n".join(f"X-{number}: 1" for number in range(300)), 431, "headers_too_large"),
        ("Content-Length: 5", 400, "bad_request"),
        ("Transfer-Encoding: chunked", 400, "bad_request"),
    ],
)
async def test_a_handshake_that_breaks_a_limit_gets_an_answer(
    proxy: LiveProxy, upstream: RealtimeUpstream, header: str, status: int, code: str
) -> None:
    with RawSocket(proxy, "/v1/realtime", header) as client:
        answer = client.answer()
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)
    assert not upstream.requests


@pytest.mark.parametrize(
    "headers",
    [
        ("Sec-WebSocket-Version: 8", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="),
        ("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",),
        ("Sec-WebSocket-Version: 13",),
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: short"),
    ],
)
async def test_a_handshake_that_is_none_gets_an_error_in_openais_form(
    proxy: LiveProxy, upstream: RealtimeUpstream, headers: tuple[str, ...]
) -> None:
    with RawClient(proxy) as client:
        client.request("GET", "/v1/realtime", "Connection: Upgrade", "Upgrade: websocket", *headers)
        answer = client.answer()
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "bad_request")
    assert answer.value("sec-websocket-version") == "13"
    assert answer.value("access-control-allow-origin") == "*"
    assert not upstream.requests


@pytest.mark.parametrize(
    "header", ["X-Long: " + "x" * 30_000, "\r\n".join(f"X-{number}: 1" for number in range(200))], ids=["long", "many"]
)
async def test_a_handshake_may_be_as_long_as_any_request(
    bare_proxy: LiveProxy, wire: FakeUpstream, header: str
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.answer(b"{}", status="401 Unauthorized")

    wire.script = script
    target = "/v1/realtime?q=" + "q" * 10_000
    with RawSocket(bare_proxy, target, header) as client:
        assert client.answer().status == 401
    assert wire.requests[0].target == target


async def test_what_a_client_sends_before_the_answer_is_not_lost(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    head = (
        b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with RawClient(proxy) as raw:
        raw.send(head + Frame(Opcode.TEXT, b"early").serialize(mask=True))
        raw.read_until(b"\r\n\r\n")
        assert raw.read_exactly(7) == b"\x81\x05early"


# The handshake, downwards


async def test_headers_of_the_answer_reach_the_client(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    upstream.response_headers = [
        ("X-Request-Id", "req_1"),
        ("OpenAI-Processing-Ms", "5"),
        ("X-Twice", "1"),
        ("X-Twice", "2"),
        ("Set-Cookie", "a=b"),
        ("Alt-Svc", "h3"),
        ("Keep-Alive", "5"),
    ]
    async with dial(proxy) as client:
        assert client.response is not None
        headers = client.response.headers
    assert (headers["x-request-id"], headers["openai-processing-ms"]) == ("req_1", "5")
    assert headers.get_all("x-twice") == ["1", "2"]
    assert len(headers.get_all("date")) == 1
    assert len(headers.get_all("connection")) == len(headers.get_all("sec-websocket-accept")) == 1
    assert not {"set-cookie", "alt-svc", "keep-alive", "sec-websocket-extensions"} & {name.lower() for name in headers}


@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 429, 500, 503])
async def test_a_refusal_reaches_the_client_as_it_came(
    proxy: LiveProxy, upstream: RealtimeUpstream, status: int
) -> None:
    body = b'{"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}'
    headers = Headers(
        [
            ("Content-Type", "application/json"),
            ("X-Request-Id", "req_2"),
            ("Retry-After", "7"),
            ("Location", "ws://127.0.0.1:1/elsewhere"),
            ("Set-Cookie", "a=b"),
            ("Content-Length", str(len(body))),
        ]
    )
    upstream.refuse = lambda request: Response(status, "No", headers, body)
    with RawSocket(proxy) as client:
        answer = client.answer()
    assert (answer.status, answer.body, answer.end) == (status, body, "whole")
    assert (answer.value("content-type"), answer.value("x-request-id")) == ("application/json", "req_2")
    assert (answer.value("retry-after"), answer.value("location")) == ("7", "ws://127.0.0.1:1/elsewhere")
    assert answer.value("set-cookie") is None


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 403 No\r\nX-A: b\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nX-A: b\r\n\r\n", b""),
    ],
)
async def test_a_refusal_says_of_its_body_what_the_upstream_said(
    bare_proxy: LiveProxy, wire: FakeUpstream, answer: bytes, body: bytes
) -> None:
    wire.script = raw_answer(answer)
    with RawSocket(bare_proxy) as client:
        refused = client.answer()
        assert client.read_to_end() == b""
    assert (refused.status, refused.body) == (int(answer[9:12]), body)
    assert (refused.value("x-a"), refused.value("content-type")) == ("b", None)
    length = None if refused.status in (204, 304) else str(len(body))
    assert (refused.value("content-length"), refused.value("connection")) == (length, "close")


async def test_a_refusal_may_be_chunked(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start_stream(status="401 Unauthorized", headers=(("content-type", "application/json"),))
        await exchange.chunk(b'{"a":')
        await exchange.chunk(b"1}")
        await exchange.end_stream()

    wire.script = script
    response = await refusal(bare_proxy)
    assert (response.status_code, response.body) == (401, b'{"a":1}')


async def test_a_refusal_may_end_with_the_connection(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 403 No\r\nx-a: 1\r\n\r\nno entry")
        await exchange.close()

    wire.script = script
    response = await refusal(bare_proxy)
    assert (response.status_code, response.body, response.headers["x-a"]) == (403, b"no entry", "1")
    assert "link" not in response.headers


async def test_a_refusal_of_any_length_costs_a_bounded_amount(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 401 No\r\ncontent-length: 1000000000\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                await exchange.send(b"x" * 65536)

    wire.script = script
    response = await refusal(bare_proxy)
    assert (response.status_code, error_code(response)) == (502, "upstream_invalid_response")


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 101 Yes\r\n\r\n",
        b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: AAAA\r\n\r\n",
        b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: %ACCEPT%\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n",
        b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Accept: %ACCEPT%\r\n"
        b"Sec-WebSocket-Protocol: unasked\r\n\r\n",
    ],
)
async def test_an_answer_that_is_no_handshake_is_a_502(
    bare_proxy: LiveProxy, wire: FakeUpstream, answer: bytes
) -> None:
    async def script(exchange: Exchange) -> None:
        accept = accept_key(exchange.request.value("sec-websocket-key") or "").encode()
        await exchange.send(answer.replace(b"%ACCEPT%", accept))
        await exchange.wait_until_client_leaves()

    wire.script = script
    response = await refusal(bare_proxy)
    assert (response.status_code, error_code(response)) == (502, "upstream_invalid_response")


async def test_an_upstream_that_hangs_up_in_the_handshake_is_a_502(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.abort()

    wire.script = script
    response = await refusal(bare_proxy)
    assert (response.status_code, error_code(response)) == (502, "upstream_unreachable")


async def test_a_client_that_leaves_in_the_handshake_ends_it(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    asked = Gate()

    async def script(exchange: Exchange) -> None:
        asked.open()
        wire.signals.put(await exchange.wait_until_client_leaves())

    wire.script = script
    with RawSocket(bare_proxy):
        await asked.wait()
    took_s = await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)
    assert isinstance(took_s, float)
    assert took_s < LEFT_WITHIN_S


async def test_one_stream_too_many_is_a_503(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await exchange.wait_until_client_leaves()

    wire.script = script
    async with contextlib.AsyncExitStack() as streams:
        for _ in range(3):
            await streams.enter_async_context(await dial_once_there_is_room(bare_proxy))
        response = await refusal(bare_proxy)
        assert (response.status_code, error_code(response)) == (503, "gateway_overloaded")
        assert response.headers["retry-after"] == "1"
    await (await dial_once_there_is_room(bare_proxy)).close()


async def dial_once_there_is_room(proxy: LiveProxy) -> ClientConnection:
    """Return an open connection: a stream that has ended for its client may not yet have for the proxy."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(InvalidStatus):
                return await dial(proxy)


async def test_an_upstream_may_speak_with_its_handshake(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.writer.write(b"")
        accept = accept_key(exchange.request.value("sec-websocket-key") or "")
        head = f"HTTP/1.1 101 Y\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        await exchange.send(head.encode() + server_frame(Opcode.TEXT, b"at once"))
        await exchange.wait_until_client_leaves()

    wire.script = script
    async with dial(bare_proxy) as client:
        assert await client.recv() == "at once"


# Logs


async def test_no_key_path_or_message_is_logged(proxy: LiveProxy) -> None:
    """The proxy under test logs at DEBUG; uvicorn and websockets would write all of this."""
    assert "DEBUG" in proxy.log
    assert not secrets_in(proxy.log)


async def test_nothing_ordinary_is_logged_as_an_error(proxy: LiveProxy, bare_proxy: LiveProxy) -> None:
    """Runs last, over everything that this module has made the two proxies do."""
    assert not errors_in(proxy.log)
    assert not errors_in(bare_proxy.log)
