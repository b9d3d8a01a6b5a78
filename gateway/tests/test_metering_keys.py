"""Whose a request in the ledger is, and keys that an operator blocks."""

from __future__ import annotations

import base64

import pytest

from billing import keys
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import CHAT, KEY, Ledger, answer_json, post
from gateway.tests.raw_client import RawClient

PACKED_KEY = base64.b64encode(f":{KEY}".encode()).decode()


def test_a_key_becomes_known_by_its_first_accepted_use_only(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(b"{}", status="401 Unauthorized")

    pepper = (metered.var_dir / "key_pepper").read_text().strip().encode()
    guess, real = b"sk-a-wrong-guess-00000000", b"sk-a-real-key-0000000000"
    for script, key in ((refuse, guess), (answer_json, real)):
        upstream.script = script  # type: ignore[assignment]
        headers = {"Authorization": f"Bearer {key.decode()}"}
        metered.post("/v1/chat/completions", json=CHAT, headers=headers)
    ledger.new(2)
    known = {row[0]: row[1] for row in metered.rows("SELECT fingerprint, hint FROM billing_apikey")}
    assert keys.fingerprint(guess, pepper=pepper) not in known
    assert known[keys.fingerprint(real, pepper=pepper)] == "sk-…0000"


def test_each_request_of_a_connection_is_its_own_keys(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    pepper = (metered.var_dir / "key_pepper").read_text().strip().encode()
    sent = ["sk-first", "sk-first", "sk-second", "", "sk-first", "Basic", "Basic"]
    with RawClient(metered) as client:
        for key in sent:
            # Of another scheme the key may be in the subprotocols, which the field does not tell.
            scheme = ("Authorization: Basic abc", "Sec-WebSocket-Protocol: openai-insecure-api-key.sk-")
            fields = (f"Authorization: Bearer {key}",) if key else ()
            if key == "Basic":
                fields = (scheme[0], scheme[1] + str(len(upstream.requests)))
            client.get("/v1/models", *fields)
            assert client.answer().status == 200
    ledger.new(len(sent))
    found = metered.rows(
        "SELECT COALESCE(k.fingerprint, '') FROM billing_usagerecord r LEFT JOIN billing_apikey k ON k.id = r.key_id "
        "ORDER BY started_at, event_id"
    )[-len(sent) :]
    expected = ["sk-first", "sk-first", "sk-second", "", "sk-first", "sk-5", "sk-6"]
    assert [row[0] for row in found] == [
        keys.fingerprint(key.encode(), pepper=pepper) if key else "" for key in expected
    ]


@pytest.mark.parametrize("upgrade", [(), ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")])
def test_no_key_hides_behind_another(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, upgrade: tuple[str, ...]
) -> None:
    keys_sent = ("Authorization: Bearer sk-looked-at", "authorization: Bearer sk-taken-by-the-upstream")
    key = ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",) if upgrade else ()
    with RawClient(metered) as client:
        client.get("/v1/realtime?model=m", *keys_sent, *upgrade, *key)
        head = client.read_until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert not upstream.requests
    assert ledger.new(1)[0][2:5] == (400, "refused", "none")


def test_a_key_that_the_operator_blocks_is_refused(upstream: FakeUpstream) -> None:
    upstream.script = answer_json
    block = (
        "from billing.models import ApiKey; from billing.services import block_key;"
        "[block_key(key) for key in ApiKey.objects.all()]"
    )
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1") as proxy:
        assert post(proxy).status_code == 200
        proxy.wait_for_rows("SELECT 1 FROM billing_apikey", 1)
        proxy.manage("shell", "-c", block)
        upstream.requests.clear()
        answers = iter(lambda: post(proxy), None)
        refused = next(answer for answer in answers if answer.status_code != 200)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "key_blocked"
        forms = ({"api-key": KEY}, {"x-api-key": KEY}, {"Authorization": KEY}, {"Authorization": f"Basic {PACKED_KEY}"})
        for headers in forms:
            assert proxy.get("/v1/models", headers=headers).status_code == 403
