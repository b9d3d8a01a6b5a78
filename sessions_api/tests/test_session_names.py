"""What a session can be called, and which addresses `/pro/sessions` has."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from gateway.tests.live import LiveProxy
from sessions_api.tests.conversations import EMPTY, say, stored
from sessions_api.tests.session_calls import BEARER, ENGLISH, NOT_FOUND, address, failed, names, told

HOSTILE = [
    "a/b",
    "/",
    "//",
    "import",
    "x/import",
    "x/export",
    "%41",
    "a%2Fb",
    "?x=1#y",
    "密码 🙂",
    "' OR 1=1 --",
    "a\\b;c",
    " ",
    "+",
    "...",
    "\u202e\u2028",
    "<script>",
    "é" * 64,
    "🙂" * 64,
]


@pytest.mark.parametrize("session", HOSTILE)
def test_any_name_that_chat_takes_is_found_again(chat_proxy: LiveProxy, session: str) -> None:
    assert say(chat_proxy, "hello", session=session).status_code == 200
    assert names(chat_proxy) == [session]
    assert told(chat_proxy.get(address(session), headers=BEARER))["sessionId"] == session
    assert told(chat_proxy.get(address(session, "/export"), headers=BEARER))["messages"][0]["content"] == "hello"
    assert told(chat_proxy.request("DELETE", address(session), headers=BEARER)) == {"deleted": 1}
    assert stored(chat_proxy) == EMPTY


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ("a" * 65, "sessionId must have 1 to 64 characters."),
        (quote("🙂" * 65), "sessionId must have 1 to 64 characters."),
        ("%00", "sessionId holds characters that are not allowed."),
        ("a%0Ab", "sessionId holds characters that are not allowed."),
        ("%C2%85", "sessionId holds characters that are not allowed."),
        ("%FF", "sessionId holds characters that are not allowed."),
        ("%ED%A0%80", "sessionId holds characters that are not allowed."),
    ],
)
def test_what_no_session_can_be_called_is_refused(chat_proxy: LiveProxy, segment: str, message: str) -> None:
    for method, action in (("GET", ""), ("DELETE", ""), ("GET", "/export"), ("POST", "/import")):
        headers = BEARER | ENGLISH
        if method == "POST":
            headers |= {"Authorization": "Bearer sk-sandbox"}
        answer = chat_proxy.request(method, f"/pro/sessions/{segment}{action}", headers=headers)
        assert failed(answer) == (400, message)


@pytest.mark.parametrize("path", ["/pro/sessions/", "/pro/sessions//", "/pro/sessions/s/", "/pro/sessions/s/other"])
def test_other_addresses_are_nothing(chat_proxy: LiveProxy, path: str) -> None:
    say(chat_proxy, "hello")
    assert chat_proxy.get(path, headers=BEARER).json() == NOT_FOUND
    assert names(chat_proxy) == ["s"]
