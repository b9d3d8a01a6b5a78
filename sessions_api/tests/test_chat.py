"""The call as its users make it: a live proxy, a real upstream, the database behind it."""

from __future__ import annotations

import itertools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate
from gateway.tests.live import PATIENCE_S, LiveProxy
from gateway.tests.raw_client import RawClient
from sessions_api.tests.conversations import (
    API_KEY,
    PATH,
    answer_to,
    chunk,
    completion,
    events_of,
    execute,
    expire_all,
    parsed_events,
    remember,
    say,
    sent_up,
    sibling,
    stored,
)

RECORDS = (
    "SELECT endpoint, model, status, outcome, usage_source, input_tokens, output_tokens, is_stream "
    "FROM billing_usagerecord ORDER BY event_id"
)
EMPTY: list[tuple[Any, ...]] = []
WHOLE_TURN = [("s", 2, "", 0, "user"), ("s", 2, "", 1, "assistant")]


# The call


def test_the_original_request_gets_an_answer_of_the_original_form(chat_proxy: LiveProxy) -> None:
    body = b'{"apiKey":"sk-conversations-0123456789abcdef","sessionId":"8d1cb9b0d535","content":"hello"}'
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        answer = client.answer()
    assert answer.status == 200
    assert answer.body.decode() == '{"code":200,"message":"执行成功","data":"1: hello!"}'
    assert answer.value("content-type") == "application/json; charset=utf-8"


def test_the_upstream_is_asked_as_if_on_v1(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    headers = {"OpenAI-Organization": "org-1", "User-Agent": "mine/1.0", "X-Forwarded-For": "1.2.3.4", "Cookie": "a=b"}
    say(chat_proxy, "hello", headers=headers)
    request = talking.requests[0]
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.value("authorization") == f"Bearer {API_KEY}"
    assert json.loads(request.body) == {
        "model": "gpt-3.5-turbo",
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert request.value("accept-encoding") == "identity"
    assert (request.value("openai-organization"), request.value("user-agent")) == ("org-1", "mine/1.0")
    assert request.value("cookie") is None
    assert request.value("x-forwarded-for") is None


def test_a_model_may_be_named(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    say(chat_proxy, "hello", model="gpt-4o")
    assert json.loads(talking.requests[0].body)["model"] == "gpt-4o"
    assert chat_proxy.rows("SELECT model FROM sessions_api_chatsession") == [("gpt-4o",)]


def test_a_form_and_a_bearer_key_do_as_well(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    form = {"sessionId": "会话", "content": "你好 & 再见", "stream": "false"}
    answer = chat_proxy.post(PATH, data=form, headers={"Authorization": f"Bearer {API_KEY}"})
    assert answer.json()["data"] == "1: 你好 & 再见!"
    assert say(chat_proxy, "more", session="会话").json()["data"] == "3: more!"
    assert talking.requests[0].value("authorization") == f"Bearer {API_KEY}"


def test_the_sandbox_answers_its_key(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    answer = say(chat_proxy, "is anybody there?", api_key="sk-sandbox")
    assert "is anybody there?" in answer.json()["data"]
    assert not talking.requests


@pytest.mark.parametrize("content", ["hello", ""])
def test_every_answer_names_the_successor(chat_proxy: LiveProxy, content: str) -> None:
    answer = say(chat_proxy, content)
    assert answer.headers["deprecation"] == "@1795305600"
    assert answer.headers["link"] == '</v1/chat/completions>; rel="successor-version"'


def test_a_browser_may_ask_from_anywhere(chat_proxy: LiveProxy) -> None:
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = chat_proxy.request("OPTIONS", PATH, headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    for content in ("hello", ""):
        assert say(chat_proxy, content).headers["access-control-allow-origin"] == "*"


def test_only_post_is_answered(chat_proxy: LiveProxy) -> None:
    answer = chat_proxy.get(PATH)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST, OPTIONS"
    assert answer.json() == {"code": 405, "message": "只支持 POST 请求", "data": None}


def test_messages_are_english_for_who_prefers_that(chat_proxy: LiveProxy) -> None:
    for language, message in (
        ("en-GB,en;q=0.9", "content is missing."),
        ("fr, zh;q=0.5, en;q=0.4", "缺少参数 content"),
    ):
        body = {"apiKey": API_KEY, "sessionId": "s"}
        answer = chat_proxy.post(PATH, json=body, headers={"Accept-Language": language})
        assert answer.json() == {"code": 400, "message": message, "data": None}
    assert say(chat_proxy, "hello", headers={"Accept-Language": "en"}).json()["message"] == "Success"


# Memory


def test_the_second_message_knows_the_first(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    say(chat_proxy, "my name is Anna 😀")
    say(chat_proxy, "what is my name?")
    assert sent_up(talking) == [
        ("user", "my name is Anna 😀"),
        ("assistant", "1: my name is Anna 😀!"),
        ("user", "what is my name?"),
    ]


def test_a_session_that_has_expired_starts_afresh_before_any_purge(
    chat_proxy: LiveProxy, talking: FakeUpstream
) -> None:
    say(chat_proxy, "my name is Anna")
    expire_all(chat_proxy)
    say(chat_proxy, "what is my name?")
    assert sent_up(talking) == [("user", "what is my name?")]
    assert stored(chat_proxy) == WHOLE_TURN


def test_the_same_session_id_under_two_keys_never_meets(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    say(chat_proxy, "mine", api_key="sk-one-0123456789abcdef01")
    say(chat_proxy, "yours", api_key="sk-two-0123456789abcdef01")
    assert sent_up(talking) == [("user", "yours")]
    say(chat_proxy, "again", api_key="sk-one-0123456789abcdef01")
    assert sent_up(talking) == [("user", "mine"), ("assistant", "1: mine!"), ("user", "again")]


def test_a_turn_moves_the_expiry(chat_proxy: LiveProxy) -> None:
    say(chat_proxy, "hello")
    (before,) = chat_proxy.rows("SELECT expires_at FROM sessions_api_chatsession")
    say(chat_proxy, "hello")
    (after,) = chat_proxy.rows("SELECT expires_at FROM sessions_api_chatsession")
    assert after > before


def test_prompt_and_bounds_of_the_context(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    bounds = {"SESSION_SYSTEM_PROMPT": "Be kind.", "SESSION_CONTEXT_MESSAGES": "2", "SESSION_TTL_SECONDS": "60"}
    with sibling(chat_proxy, **bounds) as proxy:
        for content in ("one", "two", "three"):
            say(proxy, content)
    assert sent_up(talking) == [
        ("system", "Be kind."),
        ("user", "two"),
        ("assistant", "4: two!"),
        ("user", "three"),
    ]


# Streams


def test_pieces_arrive_while_the_upstream_still_speaks(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    gate = Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hel"), done=False)
        await gate.wait()
        await exchange.events(chunk("lo"), chunk(finish_reason="stop"))
        await exchange.end_stream()

    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "x", "stream": True}).encode()
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        head = client.read_until(b"\r\n\r\n").decode()
        assert client.read_until(b"\n\n").endswith('data: {"code":200,"message":"执行成功","data":"Hel"}\n\n'.encode())
        gate.open()
        rest = client.read_until(b"0\r\n\r\n")
    assert "text/event-stream" in head
    assert "x-accel-buffering: no" in head
    assert parsed_events(rest.replace(b"\r\n", b"\n")) == [
        ("message", {"code": 200, "message": "执行成功", "data": "lo"}),
        ("done", {"code": 200, "message": "执行成功", "data": None}),
    ]


def test_a_streamed_turn_is_remembered(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    events = events_of(say(chat_proxy, "hello there", stream=True))
    assert "".join(envelope["data"] for name, envelope in events if name == "message") == "1: hello there!"
    assert events[-1][0] == "done"
    assert json.loads(talking.requests[0].body)["stream_options"] == {"include_usage": True}
    say(chat_proxy, "and now?")
    assert sent_up(talking)[:2] == [("user", "hello there"), ("assistant", "1: hello there!")]


@pytest.mark.parametrize("asks_for_stream", [False, True])
def test_an_upstream_that_does_the_opposite_is_understood(
    chat_proxy: LiveProxy, upstream: FakeUpstream, asks_for_stream: bool
) -> None:
    async def opposite(exchange: Exchange) -> None:
        if json.loads(await exchange.read_body()).get("stream"):
            await exchange.answer(completion("Hi there"))
            return
        await exchange.start_stream()
        await exchange.events(chunk("Hi "), chunk("there"), chunk(finish_reason="stop"))
        await exchange.end_stream()

    upstream.script = opposite
    answer = say(chat_proxy, "hello", stream=asks_for_stream)
    assert answer.status_code == 200
    if asks_for_stream:
        told = [(name, event["data"]) for name, event in events_of(answer)]
        assert told == [("message", "Hi there"), ("done", None)]
    else:
        assert answer.json() == {"code": 200, "message": "执行成功", "data": "Hi there"}
    assert stored(chat_proxy) == WHOLE_TURN


def test_a_character_cut_into_two_events_arrives_whole(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        for half in ("\\ud83d", "\\ude00"):
            await exchange.chunk(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % half.encode())
        await exchange.events(chunk(finish_reason="stop"))
        await exchange.end_stream()

    upstream.script = script
    events = events_of(say(chat_proxy, "smile", stream=True))
    assert [envelope["data"] for _, envelope in events] == ["😀", None]


# Failures


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "429 Slow", "500 Oh"])
def test_an_error_of_the_upstreams_comes_with_its_own_message(
    chat_proxy: LiveProxy, upstream: FakeUpstream, status: str, is_stream: bool
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        headers = (("content-type", "application/json"), ("retry-after", "7"), ("x-request-id", "req_1"))
        body = {"error": {"message": "Not like this: 不行", "code": "rate_limit_exceeded"}}
        await exchange.answer(json.dumps(body).encode(), status=status, headers=headers)

    upstream.script = script
    answer = say(chat_proxy, "hello", stream=is_stream)
    code = int(status[:3])
    assert answer.status_code == code
    assert answer.json() == {"code": code, "message": "Not like this: 不行", "data": None}
    assert (answer.headers["retry-after"], answer.headers["x-request-id"]) == ("7", "req_1")
    assert stored(chat_proxy) == EMPTY


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"choices": [7]}', b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("status", ["200 OK", "503 Away", "302 Found"])
def test_an_upstream_that_makes_no_sense_is_a_failure(
    chat_proxy: LiveProxy, upstream: FakeUpstream, status: str, body: bytes
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(body, status=status)

    upstream.script = script
    answer = say(chat_proxy, "hello")
    assert answer.status_code == answer.json()["code"] == (503 if status[:3] == "503" else 502)
    assert stored(chat_proxy) == EMPTY


async def cut(exchange: Exchange) -> None:
    """Drop the line in the middle of an answer."""
    asked = json.loads(await exchange.read_body())
    await exchange.start_stream() if asked.get("stream") else await exchange.start_stream(
        headers=(("content-type", "application/json"),)
    )
    await exchange.chunk(b'data: {"choices":[{"delta":{"content":"Hal"}}]}\n\n')
    exchange.abort()


async def end_early(exchange: Exchange) -> None:
    """End a stream in an orderly way, but without its last events."""
    await exchange.read_body()
    await exchange.start_stream()
    await exchange.events(chunk("Hal"), done=False)
    await exchange.end_stream()


async def fail_in_stream(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.start_stream()
    await exchange.events(chunk("Hal"), {"error": {"message": "The model broke."}})
    await exchange.end_stream()


def test_a_cut_answer_is_a_failure(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = cut
    answer = say(chat_proxy, "hello")
    assert answer.status_code == answer.json()["code"] == 502
    assert stored(chat_proxy) == EMPTY


@pytest.mark.parametrize("script", [cut, end_early, fail_in_stream])
def test_a_cut_stream_ends_with_an_error_and_without_a_clean_end(
    chat_proxy: LiveProxy, upstream: FakeUpstream, script: Any
) -> None:
    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "x", "stream": True}).encode()
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        answer = client.answer()
    assert answer.end == "closed"
    assert [(name, envelope["code"], envelope["data"]) for name, envelope in parsed_events(answer.body)] == [
        ("message", 200, "Hal"),
        ("error", 502, None),
    ]
    assert stored(chat_proxy) == EMPTY


def test_an_upstream_that_is_not_there_is_a_502(chat_proxy: LiveProxy) -> None:
    with sibling(chat_proxy, UPSTREAM_URL="http://127.0.0.1:9") as proxy:
        answer = say(proxy, "hello")
    assert answer.json() == {"code": 502, "message": "无法连接上游", "data": None}


def test_a_silent_upstream_is_a_504(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.wait_until_client_leaves()

    upstream.script = script
    with sibling(chat_proxy, FIRST_BYTE_TIMEOUT_SECONDS="0.5") as proxy:
        answer = say(proxy, "hello")
    assert answer.json() == {"code": 504, "message": "上游响应超时", "data": None}
    assert stored(chat_proxy) == EMPTY


def test_a_failed_turn_leaves_what_was_there(chat_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    say(chat_proxy, "hello")
    upstream.script = cut
    assert say(chat_proxy, "lost").status_code == 502
    assert stored(chat_proxy) == WHOLE_TURN
    upstream.script = remember
    say(chat_proxy, "again")
    assert [content for _, content in sent_up(upstream)] == ["hello", "1: hello!", "again"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_hangs_up_ends_the_turn(chat_proxy: LiveProxy, upstream: FakeUpstream, is_stream: bool) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        if is_stream:
            await exchange.start_stream()
            await exchange.events(chunk("Hal"), done=False)
        upstream.signals.put("asked")
        await exchange.wait_until_client_leaves()
        upstream.signals.put("left")

    upstream.script = script
    body = json.dumps({"apiKey": API_KEY, "sessionId": "s", "content": "x", "stream": is_stream}).encode()
    with RawClient(chat_proxy) as client:
        client.request("POST", PATH, "Content-Type: application/json", body=body)
        assert upstream.signals.get(timeout=PATIENCE_S) == "asked"
    assert upstream.signals.get(timeout=PATIENCE_S) == "left"
    upstream.script = remember
    assert say(chat_proxy, "hello").json()["data"] == "1: hello!"
    assert stored(chat_proxy) == WHOLE_TURN


# One turn at a time


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


# Caps, accounting, privacy


def test_a_full_session_says_so_before_it_costs_anything(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    with sibling(chat_proxy, SESSION_MAX_MESSAGES="2", SESSION_KEY_MAX_SESSIONS="1") as proxy:
        assert say(proxy, "hello").status_code == 200
        full, too_many = say(proxy, "more"), say(proxy, "more", session="t")
        assert say(proxy, "hello", api_key="sk-another-0123456789abcdef").status_code == 200
    assert (full.status_code, too_many.status_code) == (429, 429)
    assert "sessionId" in full.json()["message"]
    assert "会话数" in too_many.json()["message"]
    assert len(talking.requests) == 2


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_turn_is_one_usage_record(chat_proxy: LiveProxy, is_stream: bool) -> None:
    before = len(chat_proxy.rows(RECORDS))
    say(chat_proxy, "hello", stream=is_stream)
    found = chat_proxy.wait_for_rows(RECORDS, before + 1)[before:]
    expected = ("/v1/chat/completions", "gpt-3.5-turbo-0125", 200, "completed", "upstream", 100, 30, is_stream)
    assert found == [expected]
    # What reasoning took is no part of what will be said again.
    tokens = chat_proxy.rows("SELECT tokens FROM sessions_api_chatmessage ORDER BY position")
    assert tokens[1] == (20,)


@pytest.mark.parametrize("is_sealed", ["false", "true"])
def test_nothing_that_was_said_and_no_key_is_in_any_file(
    chat_proxy: LiveProxy, talking: FakeUpstream, is_sealed: str
) -> None:
    api_key, secret = f"sk-grep-for-me-{is_sealed}-0123456789", f"grep for this {is_sealed} 秘密"
    with sibling(chat_proxy, SESSION_SEALED=is_sealed, LOG_LEVEL="DEBUG") as proxy:
        for is_stream in (False, True):
            say(proxy, secret, api_key=api_key, stream=is_stream)
        assert sent_up(talking, 1)[0] == ("user", secret)
        talking.script = cut
        say(proxy, secret, api_key=api_key)
        say(proxy, secret * 100, api_key=api_key)
        proxy.post(f"{PATH}?apiKey={api_key}", content=f'{{"apiKey": "{api_key}", "content": "{secret}'.encode())
        texts = [text.encode() for text in (api_key, secret, "grep for this", "秘密")]
        files = [path for path in proxy.var_dir.rglob("*") if path.is_file()]
        assert any(path.name.startswith("db.sqlite3") for path in files) or proxy.environment.get("DATABASE_URL")
        found = [path for path in files if any(text in path.read_bytes() for text in texts)]
    rows = repr(chat_proxy.rows("SELECT * FROM sessions_api_chatsession"))
    rows += repr([bytes(row[0]) for row in chat_proxy.rows("SELECT content FROM sessions_api_chatmessage")])
    assert not found
    assert api_key not in rows
    assert "grep for this" not in rows


def test_a_sealed_session_knows_what_was_said(chat_proxy: LiveProxy) -> None:
    with sibling(chat_proxy, SESSION_SEALED="true") as proxy:
        say(proxy, "hello")
        assert say(proxy, "again").json()["data"] == "3: again!"
    assert chat_proxy.rows("SELECT is_sealed FROM sessions_api_chatsession") == [(True,)]
    # A session stays as it was begun.
    assert say(chat_proxy, "and again").json()["data"] == "5: and again!"


def test_a_message_moved_to_another_session_does_not_open(chat_proxy: LiveProxy, talking: FakeUpstream) -> None:
    say(chat_proxy, "one", session="a")
    say(chat_proxy, "two", session="b")
    execute(
        chat_proxy,
        "UPDATE sessions_api_chatmessage SET content = (SELECT m.content FROM sessions_api_chatmessage m "
        "JOIN sessions_api_chatsession s ON s.id = m.session_id WHERE s.session_id = 'b' AND m.position = 0) "
        "WHERE position = 0 AND session_id = (SELECT id FROM sessions_api_chatsession WHERE session_id = 'a')",
    )
    answer = say(chat_proxy, "what did I say?", session="a")
    assert answer.status_code == answer.json()["code"] == 500
    assert len(talking.requests) == 2
    assert say(chat_proxy, "still here", session="b").status_code == 200
