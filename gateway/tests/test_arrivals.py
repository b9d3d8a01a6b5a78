"""Answers that come whole in one turn of the worker's loop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import LiveProxy, wait_until
from gateway.tests.metered import CHAT, KEY, Ledger, answer_json
from gateway.tests.raw_client import RawClient

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
