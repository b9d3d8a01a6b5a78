"""Answers that come whole in one turn of the worker's loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from billing.events import UsageEvent
from gateway import headers as wire
from gateway.asgi import Message, Scope
from gateway.estimation import Estimator
from gateway.metering import Metering
from gateway.relay import Relay, RelayLimits
from gateway.tests.calls import until
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, wait_until
from gateway.tests.metered import CHAT, KEY, USAGE, Ledger, answer_json, chunk
from gateway.tests.raw_client import RawClient
from gateway.transport import PooledTransport, tls_context

_BODY = json.dumps(CHAT).encode()

# The worker is halted while they are sent, and so finds all of them at once when it goes on.
AnswerAll = Callable[[list[RawClient]], contextlib.AbstractContextManager[None]]


@pytest.fixture
def answer_all(metered: LiveProxy, upstream: FakeUpstream) -> AnswerAll:
    (worker,) = metered.worker_pids
    answered: list[Exchange] = []

    def ask(clients: list[RawClient]) -> Gate:
        """Ask for all clients, head and body apart, as most do; return what holds the answers up."""
        go_on = Gate()
        waiting: list[Exchange] = []

        async def script(exchange: Exchange) -> None:
            waiting.append(exchange)
            await go_on.wait()
            await answer_json(exchange)
            answered.append(exchange)

        upstream.script = script
        head = [f"Content-Length: {len(_BODY)}", "Content-Type: application/json", f"Authorization: Bearer {KEY}"]
        for client in clients:
            client.request("POST", "/v1/chat/completions", *head)
        assert metered.get("/healthz").status_code == 200  # so the heads have been read
        for client in clients:
            client.send(_BODY)
        wait_until(lambda: len(waiting) == len(clients))
        return go_on

    @contextlib.contextmanager
    def answering(clients: list[RawClient]) -> Iterator[None]:
        """Ask for all clients, and have the answers lie before a worker that is halted within."""
        # Who finds no open connection to the upstream has a task that waits for one: now there is one for each.
        ask(clients).open()
        assert {client.answer().status for client in clients} == {200}
        go_on = ask(clients)
        os.kill(worker, signal.SIGSTOP)
        try:
            go_on.open()
            wait_until(lambda: len(answered) == 2 * len(clients))
            yield
        finally:
            os.kill(worker, signal.SIGCONT)

    return answering


class _Server:
    """Our own server's part, for one request whose body is there: see `gateway.asgi.Shortcuts`."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.task: asyncio.Task[None] | None = None

    def on_shutdown(self, callback: Callable[[], None]) -> None: ...

    def start(self, application: Coroutine[Any, Any, None]) -> None:
        self.task = asyncio.get_running_loop().create_task(application)

    def end(self) -> None: ...

    def whole_body(self) -> bytes:
        return _BODY

    def has_left(self) -> bool:
        return False

    def is_clogged(self) -> bool:
        return False

    def send_part(self, part: bytes) -> None: ...

    def send_interim(self, status: int, reason: bytes, headers: wire.RawHeaders) -> None: ...

    def respond(self, status: int, reason: bytes | None, headers: wire.RawHeaders, body: bytes, **_: object) -> None:
        self.statuses.append(status)

    async def receive(self) -> Message:
        raise AssertionError("the body was there")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])

    def scope(self) -> Scope:
        headers = [(b"host", b"h"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]
        return {
            "type": "http",
            "method": "POST",
            "target": b"/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "headers": headers,
            "on_disconnect": lambda callback: None,
            "shortcuts": self,
        }


async def test_one_that_has_come_is_sent_however_late_the_loop_looks_at_the_time(upstream: FakeUpstream) -> None:
    go_on = Gate()
    waiting: list[Exchange] = []
    answered: list[Exchange] = []

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        waiting.append(exchange)
        await go_on.wait()
        await exchange.start_stream()  # for which a task is needed
        await exchange.events(chunk("Hello"), chunk(usage=USAGE))
        await exchange.end_stream()
        answered.append(exchange)

    upstream.script = script
    events: list[UsageEvent] = []
    transport = PooledTransport(ssl_context=tls_context(extra_ca_file=None))
    relay = Relay(
        upstream_url=upstream.url,
        transport=transport,
        limits=RelayLimits(silence_timeout_s=0.8),  # the time is looked at each tenth of a second
        metering=Metering(pepper=b"p" * 32, journal=events, estimates=Estimator()),
    )
    loop = asyncio.get_running_loop()
    late = loop.create_task(relay.keep_time())

    async def ask() -> list[_Server]:
        servers = [_Server() for _ in range(8)]
        for server in servers:
            begun = relay.begin(server.scope(), server.receive, server.send)
            if begun is not None:
                server.start(begun)
        await until(lambda: len(waiting) == len(servers))
        waiting.clear()
        return servers

    go_on.open()
    for server in await ask():  # so there is a connection to the upstream for each
        await until(lambda: bool(server.statuses) and not relay.exchanges)  # noqa: B023 - asked within this turn
    answered.clear()
    go_on = Gate()
    servers = await ask()
    go_on.open()
    since = loop.time()
    for passing in relay.exchanges:
        passing.deadline = since
    wait_until(lambda: len(answered) == len(servers) and loop.time() > since + 0.3)  # and the loop stands still
    await until(lambda: all(server.statuses for server in servers))
    late.cancel()
    await transport.aclose()
    assert [server.statuses for server in servers] == [[200]] * len(servers)
    assert {event.outcome for event in events} == {"completed"}


def _writes(pid: int) -> int:
    """Return how often the process's main thread has asked the system to write (proc(5))."""
    lines = Path(f"/proc/{pid}/task/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("syscw")).split()[1])


def test_they_are_written_down_in_one_piece(metered: LiveProxy, ledger: Ledger, answer_all: AnswerAll) -> None:
    (worker,) = metered.worker_pids
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(metered)) for _ in range(40)]
        with answer_all(clients):
            before = _writes(worker)
        assert [client.answer().status for client in clients] == [200] * 40
        # One to each client, and one for all of them together to the journal.
        assert 40 < _writes(worker) - before < 60
    assert {record[3:6] for record in ledger.new(80)} == {("completed", "upstream", 60)}


def test_one_whose_client_leaves_in_the_same_turn_is_recorded_as_it_came(
    metered: LiveProxy, ledger: Ledger, answer_all: AnswerAll
) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(metered)) for _ in range(8)]
        with answer_all(clients):
            for client in clients[:3]:
                client.socket.close()
        assert [client.answer().status for client in clients[3:]] == [200] * 5
    assert {record[3:6] for record in ledger.new(16)} == {("completed", "upstream", 60)}
