"""`manage.py doctor --url` with a key that the instance itself limits: no fault of the network."""

from __future__ import annotations

import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.limited import limited_proxy
from gateway.tests.live import LiveProxy
from proxysite.tests.examination import Report, examine, refuse, said, trouble
from proxysite.tests.fronts import NGINX, Nginx

KEY = "sk-doctor-0123456789abcdef"
# What a front as it comes from the package does wrong, and what is right about it.
AS_IT_COMES = "proxy_buffering on;"
WITHOUT_TIMING = """
    proxy_http_version 1.1; proxy_buffering off; proxy_request_buffering off; client_max_body_size 0;
    proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    proxy_hide_header Server-Timing;
"""
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian package nginx-light)")


def through(proxy: LiveProxy, url: str = "", *arguments: str, code: int = 1) -> Report:
    """Return what is found on the way to a proxy, its own state left out."""
    report = examine(proxy, "--url", url or proxy.url, *arguments, code=code, JOURNAL_MAX_BYTES="2000000")
    del report["beat"]  # none runs here
    return report


@pytest.mark.parametrize(
    ("limit", "answer"),
    [
        ({"KEY_REQUESTS_PER_MINUTE": "1"}, "429 rate_limit_exceeded"),
        ({"ALLOWED_MODELS": "gpt-4o-mini"}, "403 model_not_allowed"),
        ({"KEY_MONTHLY_USD": "10"}, "403 model_unpriced"),
        ({"ADDRESS_TOKENS_PER_MINUTE": "5"}, "429 rate_limit_exceeded"),
    ],
)
def test_a_limit_is_one_finding_and_no_fault_of_the_network(
    upstream: FakeUpstream, limit: dict[str, str], answer: str
) -> None:
    upstream.script = refuse
    with limited_proxy({}, UPSTREAM_URL=upstream.url, SANDBOX_ENABLED="true", REDIS_URL="", **limit) as proxy:
        report = through(proxy)
    assert trouble(report) == {"limits": "warning"}
    assert answer in said(report, "limits")
    assert "streams" in said(report, "limits")
    assert "give --key one without limits" in said(report, "limits")


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ({"GATEWAY_MODE": "known"}, "403 key_not_registered"),
        ({"ALLOWED_NETWORKS": "10.0.0.0/8"}, "403 address_not_allowed"),
    ],
)
def test_a_key_that_may_nothing_here_ends_it_with_what_to_do(
    upstream: FakeUpstream, setting: dict[str, str], answer: str
) -> None:
    upstream.script = refuse
    with limited_proxy({}, UPSTREAM_URL=upstream.url, SANDBOX_ENABLED="true", REDIS_URL="", **setting) as proxy:
        report = through(proxy, "", "--key", KEY, code=2)
    assert trouble(report) == {"limits": "error"}
    assert answer in said(report, "limits")
    assert "SANDBOX_ENABLED" not in said(report, "limits")


@needs_nginx
def test_faults_of_the_network_are_still_found_beside_a_limit(upstream: FakeUpstream) -> None:
    upstream.script = refuse
    limit = {"ALLOWED_MODELS": "sandbox-slow", "SANDBOX_ENABLED": "true", "REDIS_URL": ""}
    with limited_proxy({}, UPSTREAM_URL=upstream.url, **limit) as proxy, Nginx(proxy.port, AS_IT_COMES) as front:
        report = through(proxy, front.url, code=2)
    assert trouble(report) == {"answers": "warning", "size": "warning", "websocket": "error", "limits": "warning"}
    assert "uploads, errors (403 model_not_allowed)" in said(report, "limits")


@needs_nginx
def test_a_front_that_hides_the_timing_changes_nothing(upstream: FakeUpstream) -> None:
    upstream.script = refuse
    limit = {"KEY_REQUESTS_PER_MINUTE": "1", "SANDBOX_ENABLED": "true", "REDIS_URL": ""}
    with limited_proxy({}, UPSTREAM_URL=upstream.url, **limit) as proxy, Nginx(proxy.port, WITHOUT_TIMING) as front:
        report = through(proxy, front.url)
    assert trouble(report) == {"limits": "warning"}


async def _limited_upstream(exchange: Exchange) -> None:
    await exchange.read_body()
    body = b'{"error": {"message": "x", "type": "requests", "param": null, "code": "rate_limit_exceeded"}}'
    fields = (("content-type", "application/json"), ("x-request-id", "req_1"))
    is_stream = exchange.request.target == "/v1/chat/completions"
    await exchange.answer(body if is_stream else b"{}", status="429 No" if is_stream else "200 OK", headers=fields)


def test_a_limit_of_the_upstreams_is_told_apart(upstream: FakeUpstream) -> None:
    upstream.script = _limited_upstream
    with LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        report = through(proxy, "", "--key", KEY, code=2)
    assert "limits" not in report
    assert "429 The upstream limits this key" in said(report, "streams")
