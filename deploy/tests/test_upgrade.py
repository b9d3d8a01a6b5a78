"""An old and a new version side by side behind nginx: streams finish, nothing is refused, everything is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from deploy.tests.conftest import require_programs
from deploy.tests.traffic import MESSAGES, MODEL, PATIENCE_S, Numbered, new_client, recorded, wait_until
from deploy.topology import Topology
from gateway.tests.fake_upstream import FakeUpstream, Gate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STREAMS = 20
KEY = {"authorization": "Bearer sk-upgrade"}


@pytest.fixture
def upstreams() -> Iterator[tuple[FakeUpstream, FakeUpstream]]:
    """What the old version asks, and what the new one asks."""
    with FakeUpstream() as old, FakeUpstream() as new:
        yield old, new
        assert not old.failures
        assert not new.failures


class Asking:
    """Clients that ask for one whole answer after another, each over a connection of its own, until the block ends."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]
        self.ids: list[str] = []
        self.failures: list[str] = []

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        body = {"model": MODEL, "messages": MESSAGES}
        with new_client(self._topology, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not self._is_over.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json=body, headers=KEY)
                except httpx.HTTPError as exc:
                    self.failures.append(repr(exc))
                    continue
                if answer.status_code == 200:
                    self.ids.append(answer.headers["x-request-id"])
                else:
                    self.failures.append(f"{answer.status_code} {answer.text[:200]}")

    def wait_for_more(self, count: int) -> None:
        enough = len(self.ids) + count
        wait_until(lambda: len(self.ids) >= enough or self.failures, "more answers")


def stream_to_its_end(topology: Topology) -> bytes:
    body = {"model": MODEL, "messages": MESSAGES, "stream": True}
    with new_client(topology) as client:
        return client.post("/v1/chat/completions", json=body, headers=KEY, timeout=5 * PATIENCE_S).content


def test_a_rolling_upgrade_keeps_streams_and_refuses_nothing(upstreams: tuple[FakeUpstream, FakeUpstream]) -> None:
    require_programs()
    old_upstream, new_upstream = upstreams
    gate = Gate()
    held, old_script, new_script = Numbered(gate, name="held"), Numbered(name="old"), Numbered(name="new")
    with Topology({"UPSTREAM_URL": old_upstream.url, "DEFAULT_GRANT_USD": "100"}) as topology:
        old = list(topology.services["gateway"])
        old_upstream.script, new_upstream.script = held, new_script
        with ThreadPoolExecutor(STREAMS) as pool:
            streams = [pool.submit(stream_to_its_end, topology) for _ in range(STREAMS)]
            wait_until(lambda: held.begun == STREAMS, "all streams under way")
            old_upstream.script = old_script
            with Asking(topology) as asking:
                asking.wait_for_more(20)
                new = [topology.add("gateway", {"UPSTREAM_URL": new_upstream.url}) for _ in range(2)]
                topology.route(new)
                topology.reload_nginx()
                wait_until(lambda: len(new_upstream.requests) >= 10, "requests at the new version")
                for gateway in old:
                    gateway.is_wanted = False
                    gateway.send(gateway.plan.stop_signal)
                asking.wait_for_more(50)
                assert all(gateway.is_running for gateway in old)
                assert not any(stream.done() for stream in streams)
                before = len(old_upstream.requests)
                asking.wait_for_more(20)
                gate.open()
                answers = [stream.result(PATIENCE_S) for stream in streams]
            assert [gateway.wait(PATIENCE_S) for gateway in old] == [0, 0]
        assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
        assert asking.failures == []
        assert len(old_upstream.requests) == before
        ids = {*asking.ids, *(f"held-{number}" for number in range(1, STREAMS + 1))}
        wait_until(lambda: ids <= set(recorded(topology)), "everything in the ledger")
        assert set(recorded(topology).values()) == {1}
