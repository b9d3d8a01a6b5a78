"""Whatever happens in whatever order: no message is ever seen by another key, no turn is half, order holds."""

from __future__ import annotations

import datetime as dt
import json
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest
from django.db import transaction
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from billing import keys
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from sessions_api import selectors, services
from sessions_api.tests.conversations import (
    NOW,
    PATH,
    begin,
    caller,
    completion,
    contents_of,
    execute,
    say,
    sibling,
    store,
)
from sessions_api.tests.test_turns import assert_sums_are_right
from sessions_api.turns import SessionBusyError, Turn, TurnLostError

KEYS = ("sk-one-0123456789abcdef01", "sk-two-0123456789abcdef01")
SESSIONS = ("a", "b")
TTL_S, LEASE_S = 1800, 30


# Every order of steps in the database, with the clock in hand


class Steps(RuleBasedStateMachine):
    """Turns begun, stored, abandoned and lost while time passes, beside what must come of it."""

    turns = Bundle("turns")

    def __init__(self) -> None:
        super().__init__()
        self._atomic = transaction.atomic()
        self._atomic.__enter__()
        self.now = NOW
        self.number = 0
        self.said: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.expires: dict[tuple[str, str], dt.datetime] = {}
        self.holder: dict[tuple[str, str], tuple[str, dt.datetime]] = {}

    def teardown(self) -> None:
        transaction.set_rollback(True)
        self._atomic.__exit__(None, None, None)

    def remembered(self, name: tuple[str, str]) -> list[str]:
        return self.said[name] if self.expires.get(name, self.now) > self.now else []

    def is_held(self, name: tuple[str, str]) -> bool:
        return name in self.holder and self.holder[name][1] > self.now

    @rule(target=turns, key=st.sampled_from(KEYS), session=st.sampled_from(SESSIONS))
    def begin(self, key: str, session: str) -> Any:
        name = (key, session)
        try:
            turn = begin(session, who=caller(key), now=self.now)
        except SessionBusyError:
            assert self.is_held(name)
            return multiple()
        assert not self.is_held(name)
        assert [said.content for said in turn.history] == self.remembered(name)
        if not self.remembered(name):
            self.said[name] = []
        self.holder[name] = (turn.token, self.now + dt.timedelta(seconds=LEASE_S))
        return name, turn

    @rule(begun=consumes(turns), seconds=st.sampled_from([0, 1, LEASE_S + 1]))
    def store(self, begun: tuple[tuple[str, str], Turn], seconds: int) -> None:
        name, turn = begun
        self.now += dt.timedelta(seconds=seconds)
        self.number += 1
        question, answer = f"{name} {self.number}?", f"{name} {self.number}!"
        is_ours = self.holder.get(name, ("",))[0] == turn.token
        try:
            store(turn, question, answer, who=caller(name[0]), now=self.now)
        except TurnLostError:
            assert not is_ours
            return
        assert is_ours
        self.said[name] = [*self.said[name], question, answer]
        self.expires[name] = self.now + dt.timedelta(seconds=TTL_S)
        del self.holder[name]

    @rule(begun=consumes(turns))
    def fail(self, begun: tuple[tuple[str, str], Turn]) -> None:
        name, turn = begun
        services.abandon_turn(caller(name[0]), name[1], token=turn.token)
        if self.holder.get(name, ("",))[0] == turn.token:
            del self.holder[name]

    @rule(begun=turns)
    def renew(self, begun: tuple[tuple[str, str], Turn]) -> None:
        name, turn = begun
        is_ours = self.holder.get(name, ("",))[0] == turn.token
        assert services.renew_leases([turn], now=self.now) == int(is_ours)
        if is_ours:
            self.holder[name] = (turn.token, self.now + dt.timedelta(seconds=LEASE_S))

    @rule(seconds=st.sampled_from([1, LEASE_S, TTL_S - 1, TTL_S]))
    def wait(self, seconds: int) -> None:
        self.now += dt.timedelta(seconds=seconds)

    @rule()
    def purge(self) -> None:
        services.purge_expired_sessions(now=self.now)
        self._forget_expired()

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.said)))
        was_there = services.delete_session(caller(name[0]).fingerprint, name[1], now=self.now)
        assert was_there == bool(self.remembered(name))
        self.said[name] = []
        self.holder.pop(name, None)

    def _forget_expired(self) -> None:
        """A purge removes rows that nobody holds: a late turn finds nothing to be stored in."""
        for name in list(self.said):
            if not self.remembered(name) and not self.is_held(name):
                self.said[name] = []
                self.holder.pop(name, None)

    @invariant()
    def every_read_is_what_was_said(self) -> None:
        for key in KEYS:
            who = caller(key)
            for session in SESSIONS:
                found = selectors.session_of_key(who.fingerprint, session, self.now)
                contents = contents_of(found, who=who) if found else []
                assert contents == self.remembered((key, session))

    @invariant()
    def sums_are_right(self) -> None:
        assert_sums_are_right()


@pytest.mark.django_db
def test_every_order_of_steps(settings: Any) -> None:
    settings.SESSION_TTL_SECONDS, settings.SESSION_LEASE_SECONDS = TTL_S, LEASE_S
    run_state_machine_as_test(
        Steps, settings=hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None)
    )


# Real requests at the same time, through two proxies on one database


class Crowd:
    """Callers who talk at once, hang up, and meet an upstream that fails; what each heard is kept by what he said."""

    def __init__(self, proxies: list[LiveProxy], upstream: FakeUpstream, seed: int) -> None:
        self._proxies = proxies
        self._upstream = upstream
        self._seed = seed
        self._lock = threading.Lock()
        self.outcomes: dict[str, str] = {}
        # How many requests the upstream had seen when the sessions of this name expired.
        self.expiries: dict[tuple[str, str], list[int]] = defaultdict(list)

    async def script(self, exchange: Exchange) -> None:
        asked = json.loads(await exchange.read_body())
        content = asked["messages"][-1]["content"]
        if "FAIL" in content:
            await exchange.answer(b'{"error": {"message": "no"}}', status="500 No")
        elif "CUT" in content:
            await exchange.start_stream()
            await exchange.chunk(b'data: {"choices":[{"delta":{"content":"half"}}]}\n\n')
            exchange.abort()
        elif asked.get("stream"):
            await exchange.start_stream()
            pieces = ({"choices": [{"delta": {"content": part}}]} for part in ("re: ", content))
            await exchange.events(*pieces, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
            await exchange.end_stream()
        else:
            await exchange.answer(completion(f"re: {content}"))

    def run(self, callers: int, messages: int) -> None:
        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(lambda number: self._talk(number, messages), range(callers)))

    def _talk(self, number: int, messages: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        for count in range(messages):
            key, session = chance.choice(KEYS), chance.choice(SESSIONS)
            what = chance.choices(["say", "stream", "FAIL", "CUT", "leave", "expire"], [6, 4, 1, 1, 1, 1])[0]
            proxy = chance.choice(self._proxies)
            content = f"{key} {session} {number}-{count} {what}"
            if what == "expire":
                with self._lock:
                    self._expire(key, session)
            elif what == "leave":
                self.outcomes[content] = "unknown"
                body = json.dumps({"apiKey": key, "sessionId": session, "content": content, "stream": True})
                with suppress(AssertionError, OSError), RawClient(proxy) as client:
                    client.request("POST", PATH, "Content-Type: application/json", body=body.encode())
                    if chance.random() < 0.5:
                        client.read_until(b"\r\n\r\n")
            else:
                self.outcomes[content] = "failed"
                with suppress(httpx.RemoteProtocolError):
                    answer = say(proxy, content, session=session, api_key=key, stream=what in ("stream", "CUT"))
                    if answer.status_code == 200:
                        self.outcomes[content] = "stored"

    def _expire(self, key: str, session: str) -> None:
        execute(
            self._proxies[0],
            "UPDATE sessions_api_chatsession SET expires_at = '2020-01-01 00:00:00+00:00' "
            f"WHERE key_fingerprint = '{self.fingerprint(key)}' AND session_id = '{session}'",
        )
        self.expiries[key, session].append(len(self._upstream.requests))

    def fingerprint(self, key: str) -> str:
        pepper = (self._proxies[0].var_dir / "key_pepper").read_bytes().strip()
        return keys.fingerprint(key.encode(), pepper=pepper)


def heard(upstream: FakeUpstream) -> Iterator[tuple[int, tuple[str, str], str, list[str]]]:
    """Yield number, key and session, what was said, and the history of each request, as they came."""
    for number, request in enumerate(upstream.requests):
        messages = json.loads(request.body)["messages"]
        key, session, *_ = messages[-1]["content"].split(" ")
        assert request.value("authorization") == f"Bearer {key}"
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        contents = [message["content"] for message in messages]
        for question, answer in zip(contents[:-1:2], contents[1::2], strict=True):
            assert question.startswith(f"{key} {session} ")
            assert answer == f"re: {question}"
        yield number, (key, session), contents[-1], contents[:-1]


@pytest.fixture(scope="module")
def two_proxies(_chat_proxy: LiveProxy) -> Iterator[list[LiveProxy]]:
    bounds = {"SESSION_CONTEXT_MESSAGES": "10000", "SESSION_CONTEXT_TOKENS": "10000000", "SESSION_WAIT_SECONDS": "50"}
    with sibling(_chat_proxy, **bounds) as one, sibling(_chat_proxy, **bounds) as other:
        yield [one, other]


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_never_mixes_anything_up(
    two_proxies: list[LiveProxy], chat_proxy: LiveProxy, upstream: FakeUpstream, seed: int
) -> None:
    crowd = Crowd(two_proxies, upstream, seed)
    upstream.script = crowd.script
    crowd.run(callers=6, messages=10)
    # Once more each, for what is remembered now.
    for key in KEYS:
        for session in SESSIONS:
            content = f"{key} {session} last"
            say(two_proxies[0], content, session=session, api_key=key)
            crowd.outcomes[content] = "stored"
    assert not upstream.failures
    possible: dict[tuple[str, str], list[list[str]]] = defaultdict(lambda: [[]])
    seen: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for number, name, content, history in heard(upstream):
        has_expired = any(seen[name][-2] <= at <= number for at in crowd.expiries[name])
        assert history in possible[name] or (has_expired and history == [])
        seen[name].append(number)
        after = [*history, content, f"re: {content}"]
        outcome = crowd.outcomes[content]
        possible[name] = [after] if outcome == "stored" else [history]
        if outcome == "unknown":
            possible[name].append(after)
    assert set(crowd.outcomes.values()) == {"stored", "failed", "unknown"}
    counts = chat_proxy.rows(
        "SELECT s.message_count, count(m.id), min(m.position), max(m.position) FROM sessions_api_chatsession s "
        "LEFT JOIN sessions_api_chatmessage m ON m.session_id = s.id GROUP BY s.id, s.message_count"
    )
    assert len(counts) == len(KEYS) * len(SESSIONS)
    for counted, found, first, last in counts:
        assert (counted, 0, counted - 1) == (found, first, last)
        assert counted % 2 == 0
    held = chat_proxy.rows("SELECT sessions, messages FROM sessions_api_chatholding WHERE key_fingerprint = ''")
    assert held == [(4, sum(row[0] for row in counts))]
