"""What was said stays in its session, and no key in any file, through live proxies."""

from __future__ import annotations

import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from sessions_api.tests.conversations import PATH, cut, execute, say, sent_up, sibling


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
