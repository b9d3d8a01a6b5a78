"""/metrics of a running proxy: who sees it, and that what it says is what happened."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gateway.endpoints import endpoint_of
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.raw_client import RawClient

CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello!"}]}
SANDBOX = {"Authorization": "Bearer sk-sandbox"}
Labels = tuple[tuple[str, str], ...]
Numbers = dict[tuple[str, Labels], float]


@pytest.fixture(scope="module")
def _counting(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url, SANDBOX_ENABLED="true", WORKERS="2", JOURNAL_FLUSH_SECONDS="0.1"
    ) as proxy:
        yield proxy


@pytest.fixture
def counting(_counting: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    """A proxy of two workers, whoever of them answers."""
    return _counting


def numbers(proxy: LiveProxy) -> Numbers:
    answer = proxy.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


def value(found: Numbers, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def once(proxy: LiveProxy, holds: Callable[[Numbers], bool]) -> Numbers:
    """Return the metrics once they are so: another worker's are a second old, the ledger's have a way to go."""
    deadline = time.monotonic() + 60
    while not holds(found := numbers(proxy)):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def requests_to(endpoint: str, outcome: str, status: str) -> dict[str, str]:
    return {"endpoint": endpoint, "outcome": outcome, "status": status}


def test_requests_of_all_workers_are_counted_each_once(counting: LiveProxy) -> None:
    labels = requests_to("/v1/chat/completions", "completed", "2xx")
    before = numbers(counting)
    start = value(before, "proxysite_requests_total", **labels)
    for _ in range(12):
        assert counting.post("/v1/chat/completions", json=CHAT, headers=SANDBOX).status_code == 200

    def is_said(found: Numbers) -> bool:
        has_counted = value(found, "proxysite_requests_total", **labels) >= start + 12
        return has_counted and value(found, "proxysite_workers") >= 2  # the second may still be starting

    found = once(counting, is_said)
    assert value(found, "proxysite_requests_total", **labels) == start + 12
    for histogram in ("first_byte_seconds", "request_duration_seconds"):
        endpoint = {"endpoint": "/v1/chat/completions"}
        assert value(found, f"proxysite_{histogram}_count", **endpoint) >= 12
        assert value(found, f"proxysite_{histogram}_bucket", le="+Inf", **endpoint) >= 12
    assert value(found, "proxysite_added_latency_seconds_count") >= 12
    assert value(found, "proxysite_added_latency_seconds_sum") > 0
    assert value(found, "proxysite_workers") == 2
    assert value(found, "proxysite_open_streams_limit") == 2 * 4096
    assert value(found, "proxysite_resident_bytes") > 30e6


def test_tokens_and_spend_are_the_ledgers(counting: LiveProxy) -> None:
    sums = "SELECT SUM(input_tokens), SUM(output_tokens), SUM(cost_usd), COUNT(*) FROM billing_usagerecord"
    for _ in range(3):
        counting.post("/v1/chat/completions", json=CHAT, headers=SANDBOX)

    def is_said(found: Numbers) -> bool:
        input_tokens, output_tokens, units, count = (float(number or 0) for number in counting.rows(sums)[0])
        return count >= 3 and (
            value(found, "proxysite_tokens_total", kind="input"),
            value(found, "proxysite_tokens_total", kind="output"),
            round(value(found, "proxysite_spend_usd_total") * 10**7),
            value(found, "proxysite_journal_events_total", result="recorded"),
        ) == (input_tokens, output_tokens, units, count)

    found = once(counting, is_said)
    assert value(found, "proxysite_tokens_total", kind="input") > 0
    assert value(found, "proxysite_spend_usd_total") > 0


async def _vanish(exchange: Exchange) -> None:
    await exchange.read_body()
    exchange.abort()


async def _too_many(exchange: Exchange) -> None:
    await exchange.answer(b"{}", status="429 Too Many Requests")


def test_failures_are_counted_by_what_the_client_was_told(counting: LiveProxy, upstream: FakeUpstream) -> None:
    before = numbers(counting)
    upstream.script = _vanish
    assert counting.get("/v1/models").status_code == 502
    upstream.script = _too_many
    assert counting.get("/v1/models").status_code == 429
    assert counting.get("/v1/%2e%2e/admin").status_code == 400
    with RawClient(counting) as client:
        client.request("POST", "/v1/files", "Content-Length: 99999999999")
        assert client.answer().status == 413

    def grown(found: Numbers, name: str, **labels: str) -> float:
        return value(found, name, **labels) - value(before, name, **labels)

    def growth(found: Numbers) -> list[float]:
        failed = [
            grown(found, "proxysite_errors_total", code=code)
            for code in ("request_too_large", "path_refused", "upstream_unreachable", "upstream_invalid_response")
        ]
        return [
            *failed[:2],
            failed[2] + failed[3],
            grown(found, "proxysite_upstream_answers_total", status="429"),
            grown(found, "proxysite_requests_total", **requests_to("/v1/models", "upstream_error", "5xx")),
            grown(found, "proxysite_requests_total", **requests_to("/v1/files", "refused", "4xx")),
        ]

    found = once(counting, lambda found: all(number >= 1 for number in growth(found)))
    assert growth(found) == [1] * 6


def test_open_streams_and_connections_are_seen_while_they_last(counting: LiveProxy, upstream: FakeUpstream) -> None:
    end = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start_stream()
        await exchange.chunk(b"data: {}\n\n")
        await end.wait()
        await exchange.end_stream()

    upstream.script = script
    with RawClient(counting) as client:
        client.get("/v1/models")
        client.read_until(b"data: {}")

        def are_open(found: Numbers, count: int) -> bool:
            busy = value(found, "proxysite_upstream_connections", state="busy")
            return value(found, "proxysite_open_streams") == busy == count

        once(counting, lambda found: are_open(found, 1))
        upstream.loop.call_soon_threadsafe(end.set)
        found = once(counting, lambda found: are_open(found, 0))
        assert value(found, "proxysite_upstream_connections_opened_total") >= 1


def test_a_session_over_websocket_is_one_request(counting: LiveProxy) -> None:
    from websockets.sync.client import connect

    labels = requests_to("/v1/realtime", "client_closed", "1xx")
    start = value(numbers(counting), "proxysite_requests_total", **labels)
    url = counting.url.replace("http", "ws") + "/v1/realtime?model=gpt-realtime"
    with connect(url, additional_headers=SANDBOX, proxy=None, open_timeout=60) as socket:
        assert "session.created" in str(socket.recv(timeout=60))
    found = once(counting, lambda found: value(found, "proxysite_requests_total", **labels) > start)
    assert value(found, "proxysite_requests_total", **labels) == start + 1


def test_no_count_goes_back_when_workers_are_replaced(upstream: FakeUpstream) -> None:
    labels = requests_to("/v1/models", "completed", "2xx")
    with LiveProxy(UPSTREAM_URL=upstream.url, WORKERS="2") as proxy:
        for _ in range(10):
            proxy.get("/v1/models")
        once(proxy, lambda found: value(found, "proxysite_requests_total", **labels) == 10)
        before = set(proxy.worker_pids)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        found = once(
            proxy, lambda found: value(found, "proxysite_workers") == 2 and not before & set(proxy.worker_pids)
        )
        assert value(found, "proxysite_requests_total", **labels) == 10
        proxy.stop()
        proxy.start()
        assert value(numbers(proxy), "proxysite_requests_total", **labels) == 10
        assert len(list((proxy.var_dir / "metrics").glob("*.snapshot"))) <= 2


def test_no_label_holds_text_of_a_clients(counting: LiveProxy, upstream: FakeUpstream) -> None:
    strange = "strange-text-of-a-client"
    for target in (
        f"/v1/{strange}",
        f"/v1/models/{strange}",
        f"/v1/models?x={strange}",
        f"/v1/files/{strange}/content",
    ):
        counting.request("GET", target)
    counting.request(strange.upper(), "/v1/models")
    body = {"model": strange, "messages": CHAT["messages"], "service_tier": strange}
    counting.post("/v1/chat/completions", json=body, headers=SANDBOX | {"X-Request-Id": strange})
    route = endpoint_of("GET", b"/v1/files/x/content").route
    labels = requests_to(route, "completed", "2xx")
    once(counting, lambda found: value(found, "proxysite_requests_total", **labels) >= 1)
    once(
        counting, lambda found: value(found, "proxysite_requests_total", **requests_to("other", "completed", "2xx")) > 0
    )
    assert strange not in counting.get("/metrics").text.lower()


def test_openmetrics_is_spoken_to_those_who_ask_for_it(counting: LiveProxy) -> None:
    answer = counting.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"proxysite_requests", "proxysite_open_streams", "proxysite_first_byte_seconds"} <= names


def test_head_and_other_methods(counting: LiveProxy) -> None:
    assert counting.request("HEAD", "/metrics").content == b""
    assert counting.post("/metrics").status_code == 405


# Who may see it


@pytest.mark.parametrize(
    "field",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-For": "203.0.113.9"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"CF-Connecting-IP": "127.0.0.1"},
        {"Via": "1.1 somebody"},
    ],
)
def test_what_came_through_a_proxy_is_not_from_this_machine(counting: LiveProxy, field: dict[str, str]) -> None:
    assert counting.get("/metrics", headers=field).status_code == 403


def test_a_token_opens_and_nothing_else_does(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, METRICS_TOKEN="a-token-of-some-length") as proxy:
        refused = proxy.get("/metrics")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer realm="metrics"')
        for wrong in ("Bearer a-token-of-some-lengtH", "Bearer", "Basic a-token-of-some-length", "Bearer \xff"):
            assert proxy.get("/metrics", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
        right = {"Authorization": "Bearer a-token-of-some-length", "X-Forwarded-For": "203.0.113.9"}
        assert proxy.get("/metrics", headers=right).status_code == 200


def test_networks_open_to_whoever_a_trusted_proxy_says_it_is(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, METRICS_NETWORKS="203.0.113.0/24, 2001:db8::/32") as proxy:

        def status_for(forwarded: str) -> int:
            return proxy.get("/metrics", headers={"X-Forwarded-For": forwarded}).status_code

        assert proxy.get("/metrics").status_code == 403
        assert status_for("203.0.113.9") == status_for("2001:db8::1") == 200
        assert status_for("198.51.100.1") == status_for("unknown") == 403
        # Only what the trusted proxy itself has added counts: the last one.
        assert status_for("203.0.113.9, 198.51.100.1") == 403
        assert status_for("198.51.100.1, 203.0.113.9") == 200


def test_a_token_and_networks_are_wanted_both_where_both_are_set(upstream: FakeUpstream) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, METRICS_NETWORKS="127.0.0.1", METRICS_TOKEN="token-token") as proxy:
        key = {"Authorization": "Bearer token-token"}
        assert proxy.get("/metrics").status_code == 401
        assert proxy.get("/metrics", headers=key).status_code == 200
        assert proxy.get("/metrics", headers=key | {"X-Forwarded-For": "203.0.113.9"}).status_code == 403
