"""The call as its users make it: a live proxy, a real upstream, the database behind it."""

from __future__ import annotations

import json

import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient
from sessions_api.tests.conversations import API_KEY, PATH, WHOLE_TURN, expire_all, say, sent_up, sibling, stored

RECORDS = (
    "SELECT endpoint, model, status, outcome, usage_source, input_tokens, output_tokens, is_stream "
    "FROM billing_usagerecord ORDER BY event_id"
)


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


# Caps and accounting


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
