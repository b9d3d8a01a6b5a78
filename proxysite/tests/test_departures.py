"""Clients that leave while the proxy does not read from them: their upstream's connection is closed all the same."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection

from gateway.tests.calls import LEFT_WITHIN_S
from gateway.tests.fake_realtime import RealtimeUpstream
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, raw_answer
from gateway.tests.live import PATIENCE_S, LiveProxy
from gateway.tests.raw_client import RawClient
from gateway.tests.sockets import RawSocket

WAITING = b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n"
UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
# More than the proxy reads ahead, less than this machine takes in for it.
BODY_BYTES = 1 << 20
# An answer that is passed on at once.
WHOLE_BYTES = 150_000


def leave(client: RawClient, how: str) -> None:
    client.reset() if how == "reset" else client.socket.close()


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_client_that_leaves_behind_a_large_pipelined_body_is_noticed(
    own_proxy: LiveProxy, upstream: FakeUpstream, how: str
) -> None:
    asked = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        asked.open()
        upstream.signals.put(await exchange.wait_until_client_leaves())
        exchange.abort()

    upstream.script = script
    client = RawClient(own_proxy)
    client.send(WAITING + UPLOAD % (64 << 20))
    assert asked.wait_in_thread()
    send_until_it_stays_unread(client, own_proxy)
    left_at = time.monotonic()
    leave(client, how)
    upstream.signals.get(timeout=PATIENCE_S)
    assert time.monotonic() - left_at < LEFT_WITHIN_S


@contextlib.contextmanager
def upstream_that_reads_nothing() -> Iterator[tuple[str, socket.socket]]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(PATIENCE_S)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", listener


def is_closed_within(connection: socket.socket, seconds: float) -> bool:
    """Read what stands in a connection to its end."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 20):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_client_that_leaves_during_an_upload_that_nobody_takes_is_noticed(how: str) -> None:
    with upstream_that_reads_nothing() as (url, listener), LiveProxy(UPSTREAM_URL=url) as proxy:
        client = RawClient(proxy)
        client.send(UPLOAD % (64 << 20))
        send_until_it_stays_unread(client, proxy)
        connection, _ = listener.accept()
        leave(client, how)
        with connection:
            assert is_closed_within(connection, LEFT_WITHIN_S)


def send_until_it_stays_unread(client: RawClient, proxy: LiveProxy) -> None:
    """Send until the proxy reads no more, but its machine still takes: nobody can see an end behind more."""
    client.socket.settimeout(PATIENCE_S)
    unread_since = time.monotonic()
    while time.monotonic() - unread_since < 0.5:
        if unread_bytes(client, proxy) == 0:
            client.send(b"x" * 8192)
            unread_since = time.monotonic()


def unread_bytes(client: RawClient, proxy: LiveProxy) -> int:
    """Return what has arrived at the proxy's end of a connection and was not read."""
    client_port = client.socket.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if int(local.split(":")[1], 16) == proxy.port and int(remote.split(":")[1], 16) == client_port:
            return int(queues.split(":")[1], 16)
    raise AssertionError("the connection is not open")


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_client_that_leaves_a_session_whose_upstream_reads_nothing_is_noticed(how: str) -> None:
    go_on = Gate()

    async def script(websocket: ServerConnection) -> None:
        websocket.transport.pause_reading()
        await go_on.wait(300)
        websocket.transport.abort()

    with (
        RealtimeUpstream(script) as upstream,
        LiveProxy(UPSTREAM_URL=upstream.url) as proxy,
        RawClient(proxy) as client,
    ):
        client.send(
            b"GET /v1/realtime HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        client.read_until(b"\r\n\r\n")
        (connection,) = connections_to(upstream.port)
        unread_since = time.monotonic()
        while time.monotonic() - unread_since < 0.5:
            if unread_bytes(client, proxy) == 0:
                client.send(b"\x82\xfe\x1f\x40\0\0\0\0" + b"x" * 8000)
                unread_since = time.monotonic()
        left_at = time.monotonic()
        leave(client, how)
        while connection in connections_to(upstream.port):
            assert time.monotonic() - left_at < LEFT_WITHIN_S
            time.sleep(0.02)
        go_on.open()


def connections_to(port: int) -> set[str]:
    """Return the near ends of the established connections to a port of this machine."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {line[1] for line in lines if int(line[2].split(":")[1], 16) == port and line[3] == "01"}


def test_a_client_that_half_closes_and_does_not_read_is_gone(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    sent_bytes = 0

    async def script(exchange: Exchange) -> None:
        nonlocal sent_bytes
        await exchange.start_stream()
        with contextlib.suppress(OSError):
            while True:
                await exchange.events({"text": "x" * 8192}, done=False)
                sent_bytes += 8192
        upstream.signals.put("gone")

    upstream.script = script
    with RawClient(own_proxy) as client:
        client.get()
        client.read_until(b"\n\n")
        wait_until_it_stays(lambda: sent_bytes)
        client.socket.shutdown(socket.SHUT_WR)
        assert upstream.signals.get(timeout=LEFT_WITHIN_S) == "gone"


def test_a_client_of_a_session_that_half_closes_and_does_not_read_is_gone() -> None:
    sent = 0

    async def script(websocket: ServerConnection) -> None:
        nonlocal sent
        while True:
            await websocket.send(b"x" * 8192)
            sent += 1

    with (
        RealtimeUpstream(script) as upstream,
        LiveProxy(UPSTREAM_URL=upstream.url) as proxy,
        RawSocket(proxy).opened() as client,
    ):
        wait_until_it_stays(lambda: sent)
        client.socket.shutdown(socket.SHUT_WR)
        upstream.closed.get(timeout=LEFT_WITHIN_S)


def wait_until_it_stays(read: Callable[[], int]) -> None:
    value, since = 0, time.monotonic()
    while time.monotonic() - since < 0.5 or not value:
        if read() != value:
            value, since = read(), time.monotonic()
        time.sleep(0.02)


def test_what_is_left_of_a_whole_answer_reaches_a_client_that_has_half_closed(upstream: FakeUpstream) -> None:
    body = b"x" * WHOLE_BYTES
    upstream.script = raw_answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1") as proxy, NarrowClient(proxy) as client:
        client.get()
        proxy.wait_for_rows("SELECT 1 FROM billing_usagerecord WHERE outcome = 'completed'", 1)
        assert sum(bytes_under_way(client, proxy)) < len(body)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer().body == body


class NarrowClient(RawClient):
    """One to which this machine has little under way."""

    def __init__(self, proxy: LiveProxy) -> None:
        super().__init__(proxy)
        self.socket.close()
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.connect(("127.0.0.1", proxy.port))


def bytes_under_way(client: RawClient, proxy: LiveProxy) -> Iterator[int]:
    """Yield what this machine holds of what the proxy has sent: at its end, and at the client's."""
    ends = [proxy.port, client.socket.getsockname()[1]]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        ports = [int(end.split(":")[1], 16) for end in (local, remote)]
        if sorted(ports) == sorted(ends):
            yield int(queues.split(":")[ports[0] != proxy.port], 16)


def test_connections_that_were_watched_leave_no_descriptor_behind(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    (worker,) = own_proxy.worker_pids

    def descriptors() -> int:
        return len(list(Path(f"/proc/{worker}/fd").iterdir()))

    body = b"x" * BODY_BYTES
    with RawClient(own_proxy) as client:
        client.request("POST", "/v1/files", body=body)
        client.answer()
    before = descriptors()
    for _ in range(20):
        with RawClient(own_proxy) as client:
            for _ in range(2):
                client.request("POST", "/v1/files", body=body)
                assert client.answer().status == 200
    deadline = time.monotonic() + PATIENCE_S
    while descriptors() > before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
