"""Conversations of a key that may be used from some networks only."""

from __future__ import annotations

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import limited_proxy
from sessions_api.tests.conversations import API_KEY, remember, say

INSIDE, OUTSIDE = {"x-forwarded-for": "192.0.2.5"}, {"x-forwarded-for": "198.51.100.5"}
BEARER = {"authorization": f"Bearer {API_KEY}"}
ROUTES = [
    ("GET", "/pro/sessions"),
    ("GET", "/pro/sessions/s"),
    ("GET", "/pro/sessions/s/export"),
    ("POST", "/pro/sessions/s/import"),
    ("DELETE", "/pro/sessions/s"),
    ("DELETE", "/pro/sessions"),
]
REFUSED = {"code": 403, "message": "This API key may not be used from your network address.", "data": None}


def test_conversations_are_read_and_forgotten_from_the_keys_networks_only() -> None:
    decided = {API_KEY: {"allowed_networks": "192.0.2.0/24"}}
    with FakeUpstream(remember) as upstream, limited_proxy(decided, UPSTREAM_URL=upstream.url, REDIS_URL="") as proxy:
        assert say(proxy, "a secret", headers=INSIDE).status_code == 200
        for method, path in ROUTES:
            headers = BEARER | OUTSIDE | {"Accept-Language": "en"}
            refused = proxy.request(method, path, headers=headers, json={"messages": []} if method == "POST" else None)
            assert refused.status_code == 403, path
            assert refused.json() == REFUSED
        told = proxy.get("/pro/sessions/s/export", headers=BEARER | INSIDE)
        assert told.json()["data"]["messages"][0]["content"] == "a secret"
        assert proxy.request("DELETE", "/pro/sessions", headers=BEARER | INSIDE).json()["data"] == {"deleted": 1}
