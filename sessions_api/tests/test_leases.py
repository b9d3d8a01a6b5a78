"""One turn at a time in a session, whichever worker takes it, through live proxies."""

from __future__ import annotations

import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack

import httpx2 as httpx
import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from sessions_api.leases import Queues
from sessions_api.tests.conversations import EMPTY, execute, held_turn, say, sent_up, sibling, stored
from sessions_api.turns import SessionBusyError


def test_messages_to_one_session_are_taken_one_after_the_other(
    chat_proxy: LiveProxy, impatient_proxy: LiveProxy, talking: FakeUpstream
) -> None:
    with sibling(chat_proxy) as other, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: say((chat_proxy, other)[n % 2], f"m{n}"), range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    histories = [sent_up(talking, number) for number in range(8)]
    for earlier, later in itertools.pairwise(histories):
        assert later[: len(earlier)] == earlier
        assert len(later) == len(earlier) + 2


@pytest.mark.parametrize("is_same_worker", [True, False])
def test_who_waits_too_long_is_told_when_to_try_again(
    chat_proxy: LiveProxy, impatient_proxy: LiveProxy, upstream: FakeUpstream, is_same_worker: bool
) -> None:
    with ExitStack() as stack:
        gate, first = held_turn(upstream, stack, impatient_proxy if is_same_worker else chat_proxy)
        answer = say(impatient_proxy, "second")
        assert answer.json() == {"code": 409, "message": "该会话正在处理上一条消息，请稍后再试", "data": None}
        assert int(answer.headers["retry-after"]) > 0
        assert say(impatient_proxy, "other", session="t").status_code == 200
        gate.open()
        assert first.result().status_code == 200
    assert say(impatient_proxy, "third").json()["data"] == "3: third!"


def test_a_lease_lasts_as_long_as_its_turn(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    lease = "SELECT locked_until FROM sessions_api_chatsession WHERE session_id = 's' AND lock_token <> ''"
    with ExitStack() as stack:
        gate, first = held_turn(upstream, stack, chat_proxy)
        found = chat_proxy.rows(lease)
        while (later := chat_proxy.rows(lease)) == found:  # until it is renewed
            assert not first.done()
        assert later > found
        gate.open()
        assert first.result().status_code == 200


def test_the_session_of_a_dead_worker_frees_itself(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    with sibling(chat_proxy) as doomed, ExitStack() as stack:
        _, first = held_turn(upstream, stack, doomed)
        for pid in doomed.worker_pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            first.result()
        assert say(chat_proxy, "hello").json()["data"] == "1: hello!"


def test_a_turn_whose_session_was_deleted_meanwhile_stores_nothing(
    chat_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    with ExitStack() as stack:
        gate, first = held_turn(upstream, stack, chat_proxy)
        execute(chat_proxy, "DELETE FROM sessions_api_chatsession")
        gate.open()
        assert first.result().status_code == 409
    assert stored(chat_proxy) == EMPTY


async def test_who_lets_the_next_one_in_early_lets_nobody_else_in_at_the_end() -> None:
    queues, session = Queues(), ("fingerprint", "s")
    async with AsyncExitStack() as second:
        async with queues.first_of(session, timeout_s=60) as let_next:
            let_next()
            await second.enter_async_context(queues.first_of(session, timeout_s=60))
            let_next()
        with pytest.raises(SessionBusyError):
            await second.enter_async_context(queues.first_of(session, timeout_s=0))
    async with queues.first_of(session, timeout_s=0):
        pass
