"""WebSocket through the live proxy, line by line, against a real WebSocket server; and the sandbox's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trustme
from openai import AsyncOpenAI, OpenAI
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.utils import accept_key

from gateway.tests.calls import LEFT_WITHIN_S, PATIENCE_S
from gateway.tests.egress_proxies import ConnectProxy, EgressProxy, Socks5Proxy
from gateway.tests.fake_realtime import MIB, RealtimeUpstream, echo
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, free_port
from gateway.tests.raw_client import RawClient

LIMIT = 16 * MIB
KEY = "sk-test-never-in-a-log-5f1c"
BODY = "body-never-in-a-log-8a2e"
# Whoever is there has as long to answer a ping: on a busy machine that is little.
PING_S = 2.0


@pytest.fixture
def upstream(echoing_upstream: RealtimeUpstream) -> RealtimeUpstream:
    return echoing_upstream


@pytest.fixture(scope="module")
def proxy(socket_upstream: RealtimeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(UPSTREAM_URL=socket_upstream.url, SANDBOX_ENABLED="true", LOG_LEVEL="DEBUG") as live:
        yield live


@pytest.fixture(scope="module")
def module_wire() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def wire(module_wire: FakeUpstream) -> Iterator[FakeUpstream]:
    """An upstream of single bytes, behind `bare_proxy` and `nervous_proxy`."""
    module_wire.requests.clear()
    module_wire.failures.clear()
    module_wire.signals.queue.clear()
    yield module_wire
    assert not module_wire.failures


@pytest.fixture(scope="module")
def bare_proxy(module_wire: FakeUpstream) -> Iterator[LiveProxy]:
    """A proxy with room for three."""
    with LiveProxy(UPSTREAM_URL=module_wire.url, MAX_OPEN_STREAMS="3") as live:
        yield live


@pytest.fixture(scope="module")
def nervous_proxy(module_wire: FakeUpstream) -> Iterator[LiveProxy]:
    """A proxy with short time limits."""
    with LiveProxy(
        UPSTREAM_URL=module_wire.url,
        WEBSOCKET_PING_SECONDS=str(PING_S),
        FIRST_BYTE_TIMEOUT_SECONDS="2",
        SILENCE_TIMEOUT_SECONDS="2",
    ) as live:
        yield live


def dial(proxy: LiveProxy, target: str = "/v1/realtime?model=m", **options: object) -> connect:
    options = {"proxy": None, "max_size": None, "ping_interval": None, "compression": None} | options
    options = {"open_timeout": PATIENCE_S} | options
    return connect(proxy.url.replace("http", "ws") + target, **options)  # type: ignore[arg-type]


async def refusal(proxy: LiveProxy, target: str = "/v1/realtime?model=m", **options: object) -> Response:
    with pytest.raises(InvalidStatus) as caught:
        await dial(proxy, target, **options)
    return caught.value.response


def error_code(response: Response) -> str:
    return str(json.loads(response.body)["error"]["code"])


async def end_of(websocket: ClientConnection) -> tuple[int | None, str | None]:
    """Return code and reason with which the connection ends, without sending anything."""
    with contextlib.suppress(ConnectionClosed):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await websocket.recv()
    return websocket.close_code, websocket.close_reason


async def settled(read: Callable[[], int]) -> int:
    """Return the value once it has stood still for half a second."""
    value, since = read(), time.monotonic()
    while time.monotonic() - since < 0.5:
        await asyncio.sleep(0.02)
        if read() != value:
            value, since = read(), time.monotonic()
    return value


class RawSocket(RawClient):
    """A WebSocket client of single bytes."""

    def __init__(self, proxy: LiveProxy, target: str = "/v1/realtime?model=m", *headers: str) -> None:
        super().__init__(proxy)
        self.request(
            "GET",
            target,
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            *headers,
        )

    def opened(self) -> RawSocket:
        assert self.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        return self

    def frame(self, opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> None:
        self.send(Frame(opcode, data, fin=fin).serialize(mask=True))

    def next_frame(self) -> tuple[Opcode, bytes]:
        first, length = self.read_exactly(2)
        if length == 126:
            length = int.from_bytes(self.read_exactly(2), "big")
        elif length == 127:
            length = int.from_bytes(self.read_exactly(8), "big")
        return Opcode(first & 15), self.read_exactly(length)

    def next_but_pings(self) -> tuple[Opcode, bytes]:
        while (frame := self.next_frame())[0] is Opcode.PING:
            pass
        return frame


async def shake_hands(exchange: Exchange, *headers: str) -> None:
    """Accept a WebSocket by hand."""
    accept = accept_key(exchange.request.value("sec-websocket-key") or "")
    lines = ["HTTP/1.1 101 Yes", "Upgrade: websocket", "Connection: upgrade", f"Sec-WebSocket-Accept: {accept}"]
    await exchange.send("\r\n".join([*lines, *headers, "", ""]).encode())


def server_frame(opcode: Opcode, data: bytes) -> bytes:
    return Frame(opcode, data).serialize(mask=False)


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
        ("http://evil.example/v1/realtime", 404, "unknown_url"),
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


async def test_an_upstream_that_never_answers_is_a_504(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        wire.signals.put(await exchange.wait_until_client_leaves())

    wire.script = script
    response = await refusal(nervous_proxy)
    assert (response.status_code, error_code(response)) == (504, "upstream_timeout")
    assert response.headers["content-type"].startswith("application/json")
    await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)


async def test_an_upstream_that_cannot_be_connected_to_is_a_504_or_a_502() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with LiveProxy(UPSTREAM_URL=address, CONNECT_TIMEOUT_SECONDS="0.3") as lost:
            late = await refusal(lost)
            silent.close()
            gone = await refusal(lost)
    assert (late.status_code, error_code(late)) == (504, "upstream_timeout")
    assert (gone.status_code, error_code(gone)) == (502, "upstream_unreachable")


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


# Messages


@pytest.mark.parametrize(
    "message",
    ["hello", "", b"", "ünï 语 \U0001f600", b"\x00\xff" * 500, "x" * 125, "x" * 126, "y" * 65536, b"z" * 70_000],
    ids=lambda message: f"{type(message).__name__}-{len(message)}",
)
async def test_messages_pass_both_ways(proxy: LiveProxy, upstream: RealtimeUpstream, message: str | bytes) -> None:
    async with dial(proxy) as client:
        await client.send(message)
        received = await client.recv()
    assert received == message
    assert type(received) is type(message)


async def test_ten_thousand_messages_keep_their_order(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async with dial(proxy) as client:

        async def send_all() -> None:
            for number in range(10_000):
                await client.send(str(number) if number % 2 else str(number).encode())

        sending = asyncio.create_task(send_all())
        received = [await client.recv() for _ in range(10_000)]
        await sending
    assert received == [str(number) if number % 2 else str(number).encode() for number in range(10_000)]


async def test_fragments_arrive_as_one_message(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        assert await websocket.recv() == "ab\u00e9"
        await websocket.send([b"\xc3", b"", b"\xa9"], text=True)

    upstream.play(script)
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.TEXT, b"a", fin=False)
        for _ in range(5000):
            client.frame(Opcode.CONT, b"", fin=False)
        client.frame(Opcode.PING, b"between")
        client.frame(Opcode.CONT, b"b\xc3", fin=False)
        client.frame(Opcode.CONT, b"\xa9")
        assert client.next_frame() == (Opcode.PONG, b"between")
        assert client.next_frame() == (Opcode.TEXT, b"\xc3\xa9")


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


@pytest.mark.parametrize("make", [lambda size: "t" * size, lambda size: b"b" * size], ids=["text", "binary"])
async def test_sixteen_mib_pass_both_ways(
    proxy: LiveProxy, upstream: RealtimeUpstream, make: Callable[[int], str | bytes]
) -> None:
    async with dial(proxy) as client:
        await client.send(make(LIMIT))
        assert await client.recv() == make(LIMIT)


async def test_a_larger_message_of_the_client_closes_with_1009(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    client = await dial(proxy)
    with contextlib.suppress(ConnectionClosed):
        await client.send(b"b" * (LIMIT + 1))
    assert (await end_of(client))[0] == 1009
    assert (await upstream.next_close())[0] == 1001


async def test_the_1009_is_there_for_a_client_that_sends_to_its_end_first(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        await asyncio.to_thread(client.frame, Opcode.BINARY, b"b" * (LIMIT + 1))
        client.frame(Opcode.TEXT, b"and more")
        opcode, data = client.next_frame()
    assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1009)


async def test_fragments_that_add_up_to_more_close_with_1009(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    client = await dial(proxy)
    with contextlib.suppress(ConnectionClosed):
        await client.send([b"b" * MIB] * 17)
    assert (await end_of(client))[0] == 1009
    assert (await upstream.next_close())[0] == 1001


async def test_a_larger_message_of_the_upstream_closes_with_1009(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send("before")
        await websocket.send(b"b" * (LIMIT + 1))

    upstream.play(script)
    async with dial(proxy) as client:
        assert await client.recv() == "before"
        code, reason = await end_of(client)
    assert code == 1011
    assert reason is not None
    assert reason.startswith("upstream: ")
    assert (await upstream.next_close())[0] == 1009


async def test_text_of_the_client_that_is_not_utf8_closes_with_1007(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.TEXT, b"before")
        assert client.next_frame() == (Opcode.TEXT, b"before")
        client.frame(Opcode.TEXT, b"\xff\xfe")
        opcode, data = client.next_frame()
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1007)
    assert (await upstream.next_close())[0] == 1001


@pytest.mark.parametrize("closes_at_once", [False, True])
async def test_text_of_the_upstream_that_is_not_utf8_closes_with_1007(
    proxy: LiveProxy, upstream: RealtimeUpstream, closes_at_once: bool
) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send(b"\xff\xfe", text=True)
        if not closes_at_once:
            await websocket.wait_closed()

    upstream.play(script)
    async with dial(proxy) as client:
        assert (await end_of(client))[0] == 1011
    assert (await upstream.next_close())[0] in ({1000, 1007} if closes_at_once else {1007})


@pytest.mark.parametrize(
    "frame", [b"\x83\x80abcd", b"\xf1\x80abcd", b"\x81\x01a", b"\x89\xfe\x00\x7eabcd" + b"p" * 126]
)
async def test_a_frame_against_the_protocol_closes_with_1002(
    proxy: LiveProxy, upstream: RealtimeUpstream, frame: bytes
) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        client.send(frame)
        opcode, data = client.next_frame()
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1002)
    assert (await upstream.next_close())[0] == 1001


# Backpressure


async def test_a_client_that_does_not_read_holds_the_upstream_up(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    pushed = 0

    async def script(websocket: ServerConnection) -> None:
        nonlocal pushed
        for number in range(200):
            await websocket.send(bytes([number]) * MIB)
            pushed += 1

    upstream.play(script)
    idle_bytes = proxy.worker_rss_bytes()
    async with dial(proxy, max_queue=1) as client:
        at_rest = await settled(lambda: pushed)
        assert at_rest < 60  # what the kernel's buffers and one message in each pair of hands can hold
        assert proxy.worker_rss_bytes() - idle_bytes < 20 * MIB
        received = [await client.recv() for _ in range(200)]
    assert [message[0] for message in received] == list(range(200))
    assert {len(message) for message in received} == {MIB}


async def test_an_upstream_that_does_not_read_holds_the_client_up(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    gate = Gate()

    async def script(websocket: ServerConnection) -> None:
        await gate.wait()
        for number in range(200):
            message = await websocket.recv()
            assert (len(message), message[0]) == (MIB, number)
        await websocket.send("all")

    upstream.play(script)
    pushed = 0
    idle_bytes = proxy.worker_rss_bytes()
    async with dial(proxy) as client:

        async def push() -> None:
            nonlocal pushed
            for number in range(200):
                await client.send(bytes([number]) * MIB)
                pushed += 1

        pushing = asyncio.create_task(push())
        at_rest = await settled(lambda: pushed)
        assert at_rest < 60
        assert proxy.worker_rss_bytes() - idle_bytes < 20 * MIB
        gate.open()
        assert await client.recv() == "all"
        await pushing


async def test_an_upstream_that_takes_nothing_for_too_long_is_given_up(
    nervous_proxy: LiveProxy, wire: FakeUpstream
) -> None:
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await gate.wait(60)
        exchange.abort()

    def push() -> None:
        with contextlib.suppress(OSError):  # the proxy lets go some time after it has said so
            for _ in range(60):
                client.frame(Opcode.BINARY, b"b" * MIB)

    wire.script = script
    with RawSocket(nervous_proxy) as client:
        client.opened()
        pushing = asyncio.create_task(asyncio.to_thread(push))
        opcode, data = await asyncio.to_thread(client.next_but_pings)
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1011)
        client.socket.shutdown(socket.SHUT_RDWR)
        await pushing
    gate.open()


async def test_pings_without_end_cost_a_client_that_does_not_read_nothing(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    idle_bytes = proxy.worker_rss_bytes()
    pings = Frame(Opcode.PING, b"p" * 125).serialize(mask=True) * 8000

    def flood() -> None:
        for _ in range(30):
            client.send(pings)

    def read_on() -> None:
        while client.next_frame() != (Opcode.PONG, b"the last"):
            pass

    with RawSocket(proxy) as client:
        client.opened()
        await asyncio.to_thread(flood)
        client.frame(Opcode.PING, b"the last")
        assert proxy.worker_rss_bytes() - idle_bytes < 10 * MIB
        await asyncio.to_thread(read_on)


# Ends


async def test_code_and_reason_of_the_client_reach_the_upstream(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async with dial(proxy) as client:
        await client.close(4321, "cl")
    assert await upstream.next_close() == (4321, "cl")


@pytest.mark.parametrize(
    ("code", "reason"), [(4000, "up"), (1000, ""), (1001, "bye"), (1013, "late"), (3000, "é" * 60)]
)
async def test_code_and_reason_of_the_upstream_reach_the_client(
    proxy: LiveProxy, upstream: RealtimeUpstream, code: int, reason: str
) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send("last words")
        await websocket.close(code, reason)

    upstream.play(script)
    async with dial(proxy) as client:
        assert await client.recv() == "last words"
        assert await end_of(client) == (code, reason)
    assert await upstream.next_close() == (code, reason)


async def test_a_close_without_a_code_stays_one_upwards(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    with RawSocket(proxy) as client:
        client.opened()
        client.frame(Opcode.CLOSE)
        assert client.next_frame() == (Opcode.CLOSE, b"")
    assert await upstream.next_close() == (1005, "")


async def test_a_close_without_a_code_stays_one_downwards(bare_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await exchange.send(server_frame(Opcode.CLOSE, b""))
        await exchange.wait_until_client_leaves()

    wire.script = script
    with RawSocket(bare_proxy) as client:
        assert client.opened().next_frame() == (Opcode.CLOSE, b"")


async def test_last_messages_of_a_client_arrive_before_its_close(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    got: list[int] = []

    async def script(websocket: ServerConnection) -> None:
        async for message in websocket:
            got.append(len(message))

    upstream.play(script)
    with RawSocket(proxy) as client:
        client.opened()
        for _ in range(8):
            client.frame(Opcode.BINARY, b"x" * 3 * MIB)
        client.frame(Opcode.CLOSE, Close(4001, "").serialize())
        assert client.next_frame()[0] is Opcode.CLOSE
    assert (await upstream.next_close())[0] == 4001
    assert got == [3 * MIB] * 8


async def test_an_upstream_that_breaks_off_is_a_1011(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await websocket.send("before")
        await websocket.recv()
        websocket.transport.abort()

    upstream.play(script)
    async with dial(proxy) as client:
        assert await client.recv() == "before"
        await client.send("now")
        assert await end_of(client) == (1011, "upstream: connection lost")


@pytest.mark.parametrize("leave", ["reset", "close"])
async def test_a_client_that_breaks_off_closes_the_upstream_soon(
    proxy: LiveProxy, upstream: RealtimeUpstream, leave: str
) -> None:
    client = RawSocket(proxy).opened()
    left_at = time.monotonic()
    client.reset() if leave == "reset" else client.socket.close()
    assert await upstream.next_close() == (1001, "")
    assert time.monotonic() - left_at < LEFT_WITHIN_S


async def test_a_client_that_breaks_off_cuts_an_upstream_that_does_not_answer(
    bare_proxy: LiveProxy, wire: FakeUpstream
) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        wire.signals.put("open")
        while await exchange.reader.read(65536):
            pass
        wire.signals.put("closed")

    wire.script = script
    client = RawSocket(bare_proxy).opened()
    await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)
    left_at = time.monotonic()
    client.reset()
    assert await asyncio.to_thread(wire.signals.get, True, PATIENCE_S) == "closed"
    assert time.monotonic() - left_at < LEFT_WITHIN_S


# Keepalive


async def test_each_side_is_answered_while_all_is_quiet(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async def script(websocket: ServerConnection) -> None:
        await (await websocket.ping(b"from above"))
        upstream.signals.put("ponged")
        await websocket.wait_closed()

    upstream.play(script)
    async with dial(proxy) as client:
        assert await upstream.next_signal() == "ponged"
        async with asyncio.timeout(PATIENCE_S):
            await (await client.ping(b"from below"))


async def test_silence_with_pongs_is_no_reason_to_close(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        for _ in range(4):
            head = await exchange.reader.readexactly(6)
            data = await exchange.reader.readexactly(head[1] & 127)
            data = bytes(byte ^ head[2 + at % 4] for at, byte in enumerate(data))
            assert head[0] & 15 == Opcode.PING
            await exchange.send(server_frame(Opcode.PONG, data))
        await exchange.send(server_frame(Opcode.TEXT, b"four pings"))
        await exchange.wait_until_client_leaves()

    wire.script = script
    pinged = 0
    with RawSocket(nervous_proxy) as client:
        client.opened()
        while (frame := await asyncio.to_thread(client.next_frame))[0] is Opcode.PING:
            client.frame(Opcode.PONG, frame[1])
            pinged += 1
    assert frame == (Opcode.TEXT, b"four pings")
    assert pinged >= 3


async def test_a_dead_client_is_noticed(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        wire.signals.put("open")
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await exchange.reader.readexactly(6)
                data = await exchange.reader.readexactly(head[1] & 127)
                data = bytes(byte ^ head[2 + at % 4] for at, byte in enumerate(data))
                if head[0] & 15 == Opcode.CLOSE:
                    wire.signals.put(Close.parse(data).code)
                    await exchange.send(server_frame(Opcode.CLOSE, data))
                await exchange.send(server_frame(Opcode.PONG, data))

    wire.script = script
    with RawSocket(nervous_proxy) as client:
        opcode, data = await asyncio.to_thread(client.opened().next_but_pings)
        assert (opcode, Close.parse(data).code) == (Opcode.CLOSE, 1011)
    assert await asyncio.to_thread(wire.signals.get, True, PATIENCE_S) == "open"
    assert await asyncio.to_thread(wire.signals.get, True, PATIENCE_S) == 1001


async def test_a_dead_upstream_is_noticed(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await shake_hands(exchange)
        await exchange.wait_until_client_leaves()

    wire.script = script
    async with dial(nervous_proxy) as client:
        assert await end_of(client) == (1011, "upstream: keepalive ping timeout")


async def test_who_is_held_up_is_not_taken_for_dead(nervous_proxy: LiveProxy, wire: FakeUpstream) -> None:
    """The client reads nothing for many intervals; the pings on a second connection are the clock."""
    pushed = 0

    async def script(exchange: Exchange) -> None:
        nonlocal pushed
        await shake_hands(exchange)
        if exchange.request.target == "/v1/clock":
            await answer_pings(exchange, lambda: wire.signals.put("tick"))
            return
        answering = asyncio.create_task(answer_pings(exchange))
        for _ in range(100):
            await exchange.send(server_frame(Opcode.BINARY, b"m" * MIB))
            pushed += 1
        await answering

    wire.script = script
    with RawSocket(nervous_proxy) as client:
        client.opened()
        async with dial(nervous_proxy, "/v1/clock"):
            assert await settled(lambda: pushed) < 90
            for _ in range(6):
                await asyncio.to_thread(wire.signals.get, True, PATIENCE_S)
        received = 0
        while received < 100:
            opcode, data = await asyncio.to_thread(client.next_but_pings)
            assert (opcode, len(data)) == (Opcode.BINARY, MIB)
            client.frame(Opcode.PONG)
            received += 1


async def answer_pings(exchange: Exchange, tick: Callable[[], None] = lambda: None) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            await exchange.reader.readexactly(6)
            await exchange.reader.readexactly(4)
            await exchange.send(server_frame(Opcode.PONG, b""))
            tick()


# The server stops


async def test_a_session_that_does_not_end_in_time_is_closed_with_1012_and_the_upstream_too(
    upstream: RealtimeUpstream,
) -> None:
    graceful_s = 2
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS=str(graceful_s)) as stopping:
        async with dial(stopping) as client:
            await client.send("x")
            await client.recv()
            began_at = time.monotonic()
            stop = asyncio.create_task(asyncio.to_thread(stopping.stop, signal.SIGTERM))
            assert (await end_of(client))[0] == 1012
            assert time.monotonic() - began_at < graceful_s + LEFT_WITHIN_S
            assert await upstream.next_close() == (1001, "")
            assert await stop == 0


async def test_a_session_goes_on_over_a_reload(upstream: RealtimeUpstream) -> None:
    # Longer than a busy machine may take to start the new worker.
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="300") as proxy:
        assert proxy.process is not None
        async with dial(proxy) as client:
            await client.send("before")
            assert await client.recv() == "before"
            old = proxy.worker_pids
            proxy.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(PATIENCE_S):
                while "Shutting down" not in proxy.log:  # noqa: ASYNC110 - what another process does
                    await asyncio.sleep(0.05)
            await client.send("after")
            assert await client.recv() == "after"
            assert set(old) & set(proxy.worker_pids)
        async with asyncio.timeout(PATIENCE_S):
            while set(old) & set(proxy.worker_pids):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


# Ways to the upstream


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_upstream(authority: trustme.CA) -> Iterator[RealtimeUpstream]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    with RealtimeUpstream(tls=context) as server:
        yield server


@pytest.mark.parametrize(
    ("make", "scheme"), [(None, ""), (ConnectProxy, "http"), (Socks5Proxy, "socks5"), (Socks5Proxy, "socks5h")]
)
async def test_the_upstream_is_reached_over_tls_and_through_egress_proxies(
    tls_upstream: RealtimeUpstream,
    authority: trustme.CA,
    tmp_path: Path,
    make: type[EgressProxy] | None,
    scheme: str,
) -> None:
    pushed = 0

    async def script(websocket: ServerConnection) -> None:
        nonlocal pushed
        assert await websocket.recv() == "t" * LIMIT
        await websocket.send("u" * LIMIT)
        for _ in range(100):
            await websocket.send(b"b" * MIB)
            pushed += 1
        await websocket.close(4000, "up")

    tls_upstream.play(script)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    with make(user="user", password="secret") if make else contextlib.nullcontext() as egress:
        live = LiveProxy(
            UPSTREAM_URL=tls_upstream.url,
            UPSTREAM_CA_FILE=str(ca_file),
            UPSTREAM_PROXY=egress.url(scheme) if egress else "",
            HTTPS_PROXY="http://127.0.0.1:9",
            ALL_PROXY="http://127.0.0.1:9",
        )
        with live:
            async with dial(live, max_queue=1) as client:
                await client.send("t" * LIMIT)
                assert await client.recv() == "u" * LIMIT
                assert await settled(lambda: pushed) < 90
                assert [len(await client.recv()) for _ in range(100)] == [MIB] * 100
                assert await end_of(client) == (4000, "up")
    assert tls_upstream.requests[0].headers.get_all("host") == [f"localhost:{tls_upstream.port}"]
    if egress:
        assert egress.asked_for == [("localhost", tls_upstream.port)]


async def test_a_certificate_that_nobody_vouches_for_is_a_502(tls_upstream: RealtimeUpstream) -> None:
    tls_upstream.play(echo)
    with LiveProxy(UPSTREAM_URL=tls_upstream.url) as live:
        response = await refusal(live)
    assert (response.status_code, error_code(response)) == (502, "upstream_unreachable")
    assert not tls_upstream.requests


async def test_an_egress_proxy_that_is_not_there_is_a_502_without_its_address(upstream: RealtimeUpstream) -> None:
    port = free_port()
    with LiveProxy(UPSTREAM_URL=upstream.url, UPSTREAM_PROXY=f"http://user:secret@127.0.0.1:{port}") as live:
        response = await refusal(live)
        assert "secret" not in live.log
    assert (response.status_code, error_code(response)) == (502, "upstream_unreachable")
    assert str(port).encode() not in bytes(response.body)


# The official SDK


async def play_session(websocket: ServerConnection) -> None:
    """Enough of OpenAI's realtime protocol for one turn."""
    await websocket.send(json.dumps({"type": "session.created", "event_id": "e1", "session": {"type": "realtime"}}))
    async for message in websocket:
        event = json.loads(message)
        if event["type"] == "response.create":
            for delta in ("Hel", "lo"):
                await websocket.send(json.dumps({"type": "response.output_text.delta", "delta": delta}))
            await websocket.send(json.dumps({"type": "response.done", "response": {"status": "completed"}}))
        else:
            await websocket.send(json.dumps({"type": "session.updated", "session": event.get("session")}))


@pytest.fixture
async def sdk(proxy: LiveProxy) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_the_official_sdk_holds_a_conversation(upstream: RealtimeUpstream, sdk: AsyncOpenAI) -> None:
    upstream.play(play_session)
    async with sdk.realtime.connect(model="gpt-realtime") as connection:
        created = await connection.recv()
        await connection.session.update(session={"type": "realtime", "instructions": BODY})
        updated = await connection.recv()
        await connection.response.create()
        text = ""
        async for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.done":
                break
    assert (created.type, updated.type, text) == ("session.created", "session.updated", "Hello")
    assert upstream.requests[0].path == "/v1/realtime?model=gpt-realtime"
    assert upstream.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert await upstream.next_close() == (1000, "")


async def test_the_official_sdk_sees_a_refusal(upstream: RealtimeUpstream, sdk: AsyncOpenAI) -> None:
    body = b'{"error": {"code": "invalid_api_key"}}'
    headers = Headers([("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    upstream.refuse = lambda request: Response(401, "Unauthorized", headers, body)
    with pytest.raises(InvalidStatus) as caught:
        async with sdk.realtime.connect(model="gpt-realtime"):
            pass
    assert (caught.value.response.status_code, caught.value.response.body) == (401, body)


async def test_the_official_sdk_holds_a_responses_socket(upstream: RealtimeUpstream, sdk: AsyncOpenAI) -> None:
    async def script(websocket: ServerConnection) -> None:
        event = json.loads(await websocket.recv())
        await websocket.send(json.dumps({"type": "response.output_text.delta", "delta": event["input"]}))
        await websocket.wait_closed()

    upstream.play(script)
    async with sdk.responses.connect() as connection:
        await connection.send({"type": "response.create", "model": "m", "input": BODY})  # type: ignore[typeddict-unknown-key]
        event = await connection.recv()
    assert (event.type, getattr(event, "delta", None)) == ("response.output_text.delta", BODY)
    assert upstream.requests[0].path == "/v1/responses"


def test_the_synchronous_sdk_holds_a_conversation(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    upstream.play(play_session)
    with OpenAI(base_url=f"{proxy.url}/v1", api_key=KEY) as client, client.realtime.connect(model="m") as connection:
        assert connection.recv().type == "session.created"
        connection.response.create()
        assert [connection.recv().type for _ in range(3)][-1] == "response.done"


# The sandbox


async def test_the_sandbox_answers_its_key_and_nothing_goes_upstream(
    proxy: LiveProxy, upstream: RealtimeUpstream
) -> None:
    client = AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="sk-sandbox")
    async with client, client.realtime.connect(model="gpt-realtime") as connection:
        assert (await connection.recv()).type == "session.created"
        content = [{"type": "input_text", "text": "Guten Tag"}]
        await connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": content}  # type: ignore[typeddict-item]
        )
        await connection.response.create()
        text = ""
        async for event in connection:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.done":
                break
    assert "Guten Tag" in text
    assert not upstream.requests


async def test_the_sandbox_answers_its_key_in_the_browsers_form(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    offers = [Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.sk-sandbox")]
    async with dial(proxy, subprotocols=offers) as client:
        assert json.loads(await client.recv())["type"] == "session.created"
        assert client.subprotocol == "realtime"
        await client.close(4321, "bye")
    assert not upstream.requests


async def test_the_sandbox_refuses_as_openai_does(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    headers = {"Authorization": "Bearer sk-sandbox"}
    response = await refusal(proxy, "/v1/realtime?model=sandbox-429", additional_headers=headers)
    assert (response.status_code, error_code(response)) == (429, "rate_limit_exceeded")
    assert response.headers["retry-after"] == "1"


async def test_a_sandbox_that_drops_is_a_1011(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    headers = {"Authorization": "Bearer sk-sandbox"}
    async with dial(proxy, "/v1/realtime?model=sandbox-cut", additional_headers=headers) as client:
        await client.send(json.dumps({"type": "response.create"}))
        assert (await end_of(client))[0] == 1011


async def test_another_key_goes_upstream(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    async with dial(proxy, additional_headers={"Authorization": "Bearer sk-sandbox2"}):
        pass
    assert len(upstream.requests) == 1


# Logs


async def test_no_key_path_or_message_is_logged(proxy: LiveProxy, upstream: RealtimeUpstream) -> None:
    """The proxy under test logs at DEBUG; uvicorn and websockets would write all of this."""
    headers = {"Authorization": f"Bearer {KEY}"}
    offers = [Subprotocol(f"openai-insecure-api-key.{KEY}")]
    async with dial(proxy, f"/v1/realtime?key={KEY}", additional_headers=headers, subprotocols=offers) as client:
        await client.send(BODY)
        assert await client.recv() == BODY
        await client.close(4000, BODY)
    await refusal(proxy, f"/nothing?key={KEY}")
    upstream.refuse = lambda request: Response(401, "No", Headers([("Content-Length", str(len(BODY)))]), BODY.encode())
    await refusal(proxy, f"/v1/realtime?key={KEY}", additional_headers=headers)
    log = proxy.log
    assert "DEBUG" in log
    for secret in (KEY, BODY, "/v1/realtime", "/nothing"):
        assert secret not in log


async def test_nothing_ordinary_is_logged_as_an_error(
    proxy: LiveProxy, bare_proxy: LiveProxy, nervous_proxy: LiveProxy
) -> None:
    """Runs last, over everything that this module has made the three proxies do."""
    for log in (proxy.log, bare_proxy.log, nervous_proxy.log):
        assert "Traceback" not in log
        assert not [line for line in log.splitlines() if " ERROR " in line or "[ERROR]" in line]
