"""What the tests of conversations have in common: an upstream that says what it was told, and callers."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import psycopg
from django.conf import settings

from billing import keys
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import PATIENCE_S, LiveProxy
from sessions_api import services
from sessions_api.context import Said
from sessions_api.models import ChatSession
from sessions_api.selectors import messages_of
from sessions_api.turns import Caller, Turn, new_token

PATH = "/pro/chat/completions"
API_KEY = "sk-conversations-0123456789abcdef"
NOW = dt.datetime(2026, 11, 22, 12, tzinfo=dt.UTC)
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 30,
    "total_tokens": 130,
    "completion_tokens_details": {"reasoning_tokens": 10},
}
EMPTY: list[tuple[Any, ...]] = []
WHOLE_TURN = [("s", 2, "", 0, "user"), ("s", 2, "", 1, "assistant")]


# With a live proxy


async def remember(exchange: Exchange) -> None:
    """Answer with how many messages came and what the last one said, streamed where that was asked for."""
    asked = json.loads(await exchange.read_body())
    text = answer_to(asked["messages"])
    if not asked.get("stream"):
        await exchange.answer(completion(text))
        return
    await exchange.start_stream()
    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
    await exchange.events(*map(chunk, pieces), chunk(finish_reason="stop"), {"choices": [], "usage": USAGE})
    await exchange.end_stream()


async def cut(exchange: Exchange) -> None:
    """Drop the line in the middle of an answer."""
    asked = json.loads(await exchange.read_body())
    await exchange.start_stream() if asked.get("stream") else await exchange.start_stream(
        headers=(("content-type", "application/json"),)
    )
    await exchange.chunk(b'data: {"choices":[{"delta":{"content":"Hal"}}]}\n\n')
    exchange.abort()


def answer_to(messages: list[dict[str, str]]) -> str:
    return f"{len(messages)}: {messages[-1]['content']}!"


def completion(text: str | None, **more: object) -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps({"model": "gpt-3.5-turbo-0125", "choices": choices, "usage": USAGE, **more}).encode()


def chunk(content: str | None = None, *, finish_reason: str | None = None) -> dict[str, object]:
    delta = {} if content is None else {"content": content}
    return {"model": "gpt-3.5-turbo-0125", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def say(proxy: LiveProxy, content: str, *, session: str = "s", api_key: str = API_KEY, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    body = {"apiKey": api_key, "sessionId": session, "content": content, **more}
    return proxy.post(PATH, json=body, headers=headers)


def held_turn(upstream: FakeUpstream, stack: ExitStack, proxy: LiveProxy) -> tuple[Gate, Any]:
    """Begin a turn that stays with its upstream until the gate is opened; return gate and future answer."""
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        asked = json.loads(await exchange.read_body())
        upstream.script = remember
        upstream.signals.put("asked")
        await gate.wait()
        await exchange.answer(completion(answer_to(asked["messages"])))

    upstream.script = script
    pool = stack.enter_context(ThreadPoolExecutor(1))
    stack.callback(gate.open)
    future = pool.submit(say, proxy, "first")
    assert upstream.signals.get(timeout=PATIENCE_S) == "asked"
    return gate, future


def sent_up(upstream: FakeUpstream, number: int = -1) -> list[tuple[str, str]]:
    """Return role and content of each message that one of the requests upstream held."""
    messages = json.loads(upstream.requests[number].body)["messages"]
    return [(message["role"], message["content"]) for message in messages]


def events_of(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Return name and envelope of each event of a streamed answer."""
    return parsed_events(answer.content)


def parsed_events(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in stream.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "data" in fields:
            events.append((fields.get("event", "message"), json.loads(fields["data"])))
    return events


def execute(proxy: LiveProxy, statement: str) -> None:
    """Change something in the proxy's database behind its back."""
    url = proxy.environment.get("DATABASE_URL", "")
    if url.startswith("postgres"):
        with psycopg.connect(url) as connection:
            connection.execute(statement.encode())
        return
    with contextlib.closing(sqlite3.connect(proxy.var_dir / "db.sqlite3", timeout=20)) as database, database:
        database.execute(statement)


def expire_all(proxy: LiveProxy) -> None:
    execute(proxy, "UPDATE sessions_api_chatsession SET expires_at = '2020-01-01 00:00:00+00:00'")


def stored(proxy: LiveProxy) -> list[tuple[Any, ...]]:
    """Return session id, message count and lock of every session, and where each of its messages stands."""
    return proxy.rows(
        "SELECT s.session_id, s.message_count, s.lock_token, m.position, m.role FROM sessions_api_chatsession s "
        "LEFT JOIN sessions_api_chatmessage m ON m.session_id = s.id ORDER BY s.id, m.position"
    )


@contextlib.contextmanager
def sibling(proxy: LiveProxy, **environment: str) -> Iterator[LiveProxy]:
    """Start another proxy on the same database and journal."""
    other = LiveProxy(var_dir=proxy.var_dir)
    own = {name: other.environment[name] for name in ("HOST", "PORT")}
    other.environment = proxy.environment | own | environment
    other.log_path = proxy.var_dir / f"server-{other.port}.log"
    try:
        other.start()
        yield other
    finally:
        other.stop()


# Without one


def caller(api_key: str = API_KEY) -> Caller:
    encoded = api_key.encode()
    return Caller(encoded, keys.fingerprint(encoded, pepper=settings.KEY_PEPPER.encode()), keys.hint(encoded))


def begin(session_id: str = "s", *, who: Caller | None = None, now: dt.datetime = NOW) -> Turn:
    return services.begin_turn(who or caller(), session_id, model="m", token=new_token(), now=now)


def store(turn: Turn, question: str, answer: str = "a", *, who: Caller | None = None, now: dt.datetime = NOW) -> None:
    said = [Said("user", question, 3), Said("assistant", answer, 7)]
    services.store_turn(turn, said, caller=who or caller(), model="m", now=now)


def take_turn(session_id: str, question: str, *, who: Caller | None = None, now: dt.datetime = NOW) -> Turn:
    """Begin a turn and store it."""
    turn = begin(session_id, who=who, now=now)
    store(turn, question, f"re: {question}", who=who, now=now)
    return turn


def contents_of(session: ChatSession, *, who: Caller | None = None) -> list[str]:
    return [message.said.content for message in messages_of(session, api_key=(who or caller()).api_key)]
