"""Limits that the settings give to every key and to addresses, through the live proxy."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import ask, error_of, limited_proxy
from gateway.tests.live import LiveProxy, wait_until

KNOWN = "sk-known-000000000001"


@pytest.fixture
def upstream(answering_upstream: FakeUpstream) -> FakeUpstream:
    return answering_upstream


@pytest.fixture(scope="module")
def _strict_proxy(module_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with limited_proxy(
        {KNOWN: {}},
        UPSTREAM_URL=module_upstream.url,
        REDIS_URL="",
        GATEWAY_MODE="known",
        SANDBOX_ENABLED="true",
        ADDRESS_REQUESTS_PER_MINUTE="3",
        ADDRESS_MONTHLY_USD="0.001",
        KEY_MONTHLY_USD="1000",
    ) as proxy:
        yield proxy


@pytest.fixture
def strict_proxy(_strict_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    return _strict_proxy


def test_only_registered_keys_pass_where_the_operator_wants_that(
    strict_proxy: LiveProxy, upstream: FakeUpstream
) -> None:
    headers = {"x-forwarded-for": "198.51.100.1"}
    for headers_of_stranger in ({"authorization": "Bearer sk-stranger-0000001"}, {}):
        refused = strict_proxy.get("/v1/models", headers=headers | headers_of_stranger)
        assert error_of(refused) == (403, "invalid_request_error", "key_not_registered")
    assert not upstream.requests
    client = OpenAI(api_key="sk-stranger-0000001", base_url=f"{strict_proxy.url}/v1")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.list()
    known = {"authorization": f"Bearer {KNOWN}"}
    assert strict_proxy.get("/v1/models", headers=headers | known).status_code == 200
    sandbox = {"authorization": "Bearer sk-sandbox"}
    assert strict_proxy.get("/v1/models", headers=headers | sandbox).status_code == 200


def test_an_address_has_limits_whatever_its_keys(strict_proxy: LiveProxy) -> None:
    def status_from(address: str, api_key: str = KNOWN) -> int:
        headers = {"authorization": f"Bearer {api_key}", "x-forwarded-for": address}
        return strict_proxy.get("/v1/models", headers=headers).status_code

    assert [status_from("198.51.100.7"), status_from("198.51.100.7", "sk-sandbox"), status_from("198.51.100.7")] == [
        200
    ] * 3
    assert status_from("198.51.100.7", "sk-sandbox") == 429
    assert status_from("198.51.100.8") == 200
    assert [status_from(f"2001:db8:7::{number}") for number in range(1, 5)] == [200, 200, 200, 429]


def test_what_an_address_has_spent_is_known_after_a_restart(strict_proxy: LiveProxy) -> None:
    def spend() -> int:
        headers = {"x-forwarded-for": "198.51.100.77"}
        return ask(strict_proxy, KNOWN, json={"max_tokens": 500}, headers=headers).status_code

    assert [spend(), spend()] == [200, 200]  # 0.00063 of 0.001 USD
    kept = strict_proxy.var_dir / "limits.json"
    wait_until(lambda: kept.exists() and '"spent": {"a:' in kept.read_text())
    assert "198.51.100" not in kept.read_text()
    strict_proxy.stop()
    strict_proxy.start()
    assert spend() == 200
    assert spend() == 429


def test_a_key_with_more_than_the_default_or_less(module_upstream: FakeUpstream, upstream: FakeUpstream) -> None:
    decided = {
        "sk-no-limit-0000000001": {"requests_per_minute": 0},
        "sk-more-000000000000001": {"requests_per_minute": 2},
    }
    with limited_proxy(
        decided, UPSTREAM_URL=upstream.url, REDIS_URL="", KEY_REQUESTS_PER_MINUTE="1", ALLOWED_MODELS="gpt-4o-mini"
    ) as proxy:
        assert [ask(proxy, "sk-no-limit-0000000001").status_code for _ in range(5)] == [200] * 5
        assert [ask(proxy, "sk-more-000000000000001").status_code for _ in range(3)] == [200, 200, 429]
        assert [ask(proxy, "sk-anybody-00000000001").status_code for _ in range(2)] == [200, 429]
        assert ask(proxy, "sk-no-limit-0000000001", json={"model": "gpt-4o"}).status_code == 403
