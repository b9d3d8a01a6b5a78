"""How tests ask `/pro/sessions`, and what they expect of every answer."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx2 as httpx

from gateway.tests.live import LiveProxy
from sessions_api.tests.conversations import API_KEY

BEARER = {"Authorization": f"Bearer {API_KEY}"}
STRANGER = {"Authorization": "Bearer sk-somebody-else-0123456789"}
ENGLISH = {"Accept-Language": "en"}
NOT_FOUND = {"code": 404, "message": "会话不存在或已过期", "data": None}


def told(answer: httpx.Response) -> Any:
    """Return the data of a success."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["code"], body["message"]) == (200, "执行成功")
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["access-control-allow-origin"] == "*"
    return body["data"]


def failed(answer: httpx.Response) -> tuple[int, str]:
    """Return status and English message of a failure."""
    body = answer.json()
    assert body == {"code": answer.status_code, "message": body["message"], "data": None}
    assert answer.headers["access-control-allow-origin"] == "*"
    return answer.status_code, body["message"]


def address(session: str, action: str = "") -> str:
    return f"/pro/sessions/{quote(session, safe='')}{action}"


def names(proxy: LiveProxy, headers: dict[str, str] | None = None) -> list[str]:
    return [session["sessionId"] for session in told(proxy.get("/pro/sessions", headers=headers or BEARER))["sessions"]]
