"""Turns whose client hangs up while the upstream is read on for its usage (`ON_CLIENT_DISCONNECT=drain`)."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import PATIENCE_S, LiveProxy, wait_until
from gateway.tests.raw_client import RawClient
from sessions_api.tests.conversations import (
    API_KEY,
    EMPTY,
    PATH,
    USAGE,
    WHOLE_TURN,
    chunk,
    completion,
    held_turn,
    remember,
    say,
    sent_up,
    sibling,
    stored,
)

# With usage from upstream: only what was read for nobody has that.
READ_ON = (
    "SELECT status, input_tokens, output_tokens, is_stream FROM billing_usagerecord "
    "WHERE outcome = 'client_closed' AND usage_source = 'upstream' ORDER BY event_id"
)


@pytest.fixture(scope="module")
def _draining(_chat_proxy: LiveProxy) -> Iterator[LiveProxy]:
    with sibling(_chat_proxy, ON_CLIENT_DISCONNECT="drain") as proxy:
        yield proxy


@pytest.fixture
def draining(_draining: LiveProxy, chat_proxy: LiveProxy) -> LiveProxy:
    """A proxy beside `chat_proxy`, on the same database."""
    return _draining


def leave_a_turn(proxy: LiveProxy, upstream: FakeUpstream, *, is_stream: bool = False) -> Gate:
    """Begin a turn and hang up once the upstream has it; it answers when the gate is opened, others at once."""
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        upstream.script = remember
        if is_stream:
            await exchange.start_stream()
            await exchange.events(chunk("Hal"), done=False)
        upstream.signals.put("asked")
        await gate.wait()
        if is_stream:
            await exchange.events(chunk("lo"), chunk(finish_reason="stop"), {"choices": [], "usage": USAGE})
            await exchange.end_stream()
        else:
            await exchange.answer(completion("Hallo"))

    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "lost", "stream": is_stream}).encode()
    with RawClient(proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        assert upstream.signals.get(timeout=PATIENCE_S) == "asked"
    return gate


@pytest.mark.parametrize("is_same_worker", [True, False])
@pytest.mark.parametrize("is_stream", [False, True])
def test_the_session_is_free_while_the_upstream_is_read_on(
    draining: LiveProxy, chat_proxy: LiveProxy, upstream: FakeUpstream, is_stream: bool, is_same_worker: bool
) -> None:
    before = len(chat_proxy.rows(READ_ON))
    gate = leave_a_turn(draining, upstream, is_stream=is_stream)
    proxy = draining if is_same_worker else chat_proxy
    assert say(proxy, "hello").json()["data"] == "1: hello!"
    gate.open()
    assert chat_proxy.wait_for_rows(READ_ON, before + 1)[before:] == [(200, 100, 30, is_stream)]
    assert stored(chat_proxy) == WHOLE_TURN
    assert say(draining, "again").json()["data"] == "3: again!"
    assert [content for _, content in sent_up(upstream)] == ["hello", "1: hello!", "again"]


def test_the_end_of_an_abandoned_turn_leaves_the_next_one_its_session(
    draining: LiveProxy, chat_proxy: LiveProxy, impatient_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    before = len(chat_proxy.rows(READ_ON))
    with ExitStack() as stack:
        abandoned = leave_a_turn(draining, upstream)
        gate, first = held_turn(upstream, stack, draining)
        abandoned.open()
        chat_proxy.wait_for_rows(READ_ON, before + 1)
        assert say(impatient_proxy, "second").status_code == 409
        gate.open()
        assert first.result().json()["data"] == "1: first!"
    assert stored(chat_proxy) == WHOLE_TURN


def test_a_stop_waits_for_the_upstream_that_is_read_on(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    before = len(chat_proxy.rows(READ_ON))
    with sibling(chat_proxy, ON_CLIENT_DISCONNECT="drain") as proxy:
        gate = leave_a_turn(proxy, upstream)
        wait_until(lambda: stored(chat_proxy) == EMPTY)
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "Shutting down" in proxy.log)
        gate.open()
        assert proxy.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in proxy.log
    assert chat_proxy.wait_for_rows(READ_ON, before + 1)[before:] == [(200, 100, 30, False)]
    assert stored(chat_proxy) == EMPTY
