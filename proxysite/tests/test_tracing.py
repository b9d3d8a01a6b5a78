"""Traces of a running proxy, as a collector of the test's own is sent them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from billing import keys
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import PATIENCE_S, ROOT, LiveProxy, free_port
from proxysite.tests.collector import Collector, attributes_of

KEY = "sk-traced-0123456789abcdef"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
ASKED = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hush-hush"}]}
USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 7,
    "total_tokens": 37,
    "prompt_tokens_details": {"cached_tokens": 10},
}


async def answer(exchange: Exchange) -> None:
    await exchange.read_body()
    said = {"id": "x", "model": "gpt-4o-mini-2024-07-18", "choices": [], "usage": USAGE}
    fields = (("content-type", "application/json"), ("x-request-id", "req_upstream"))
    await exchange.answer(json.dumps(said).encode(), headers=fields)


async def fail(exchange: Exchange) -> None:
    await exchange.read_body()
    await exchange.answer(b'{"error": {}}', status="500 Oops")


async def drop(exchange: Exchange) -> None:
    await exchange.read_body()
    exchange.abort()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def _traced(shared_upstream: FakeUpstream, collector: Collector) -> Iterator[LiveProxy]:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url,
        SANDBOX_ENABLED="true",
        OTEL_ENABLED="true",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="50",
    ) as proxy:
        yield proxy


@pytest.fixture
def traced(_traced: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    upstream.script = answer
    return _traced


def ask(proxy: LiveProxy, path: str = "/v1/chat/completions", key: str = KEY, **fields: str) -> str:
    """Send a request and return its id."""
    headers = {"Authorization": f"Bearer {key}"} | fields
    answer = proxy.post(path, json=ASKED, headers=headers)
    return answer.headers["x-proxy-request-id"]


def test_a_request_is_a_span_below_the_clients_with_the_upstreams_part_below_it(
    traced: LiveProxy, upstream: FakeUpstream, collector: Collector
) -> None:
    request_id = ask(traced, "/v1/chat/completions?note=unheard-of", traceparent=SAMPLED, tracestate="vendor=odd-state")
    assert upstream.requests[-1].value("traceparent") == SAMPLED
    span, child = collector.wait_for(request_id)
    assert (span.name, span.kind) == ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    said = attributes_of(span)
    times = {name: said.pop(name) for name in ("proxysite.proxy_ms", "proxysite.first_byte_ms") if name in said}
    assert 0 < times["proxysite.proxy_ms"] < PATIENCE_S * 1000
    assert said.pop("http.request.body.size") > 0
    assert said.pop("http.response.body.size") > 0
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.provider.name": "openai",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.response.model": "gpt-4o-mini-2024-07-18",
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 7,
        "proxysite.usage_source": "upstream",
        "proxysite.request_id": request_id,
        "proxysite.upstream_request_id": "req_upstream",
        "proxysite.outcome": "completed",
        "proxysite.is_stream": False,
    }
    assert (child.name, child.kind) == ("POST /v1/chat/completions", Span.SPAN_KIND_CLIENT)
    assert child.trace_id == span.trace_id
    assert span.start_time_unix_nano < child.start_time_unix_nano <= child.end_time_unix_nano
    assert attributes_of(child) == {
        "http.request.method": "POST",
        "url.template": "/v1/chat/completions",
        "server.address": "127.0.0.1",
        "server.port": upstream.port,
        "http.response.status_code": 200,
    }
    assert collector.services == {"proxysite"}
    assert set(collector.paths) == {"/v1/traces"}


def test_nothing_that_is_the_clients_own_is_sent(traced: LiveProxy, collector: Collector) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "traceparent": SAMPLED, "tracestate": "vendor=odd-state"}
    # A key in a wrong place, too.
    asked = ASKED | {"model": f"mine-{KEY}", "user": "somebody"}
    done = traced.post("/v1/chat/completions?note=unheard-of", json=asked, headers=headers)
    unknown = traced.get("/v1/of-my-own/path-of-mine", headers=headers | {"x-api": "field-of-mine"})
    for answer in (done, unknown):
        collector.wait_for(answer.headers["x-proxy-request-id"])
    sent = b"".join(collector.requests)
    pepper = (traced.var_dir / "key_pepper").read_text().strip().encode()
    private = [KEY, "0123456789abcdef", keys.fingerprint(KEY.encode(), pepper=pepper), "hush-hush", "somebody"]
    private += ["unheard-of", "odd-state", "of-my-own", "path-of-mine", "field-of-mine"]
    assert [text for text in private if text.encode() in sent] == []
    assert keys.hint(KEY.encode()).encode() not in sent


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("traceparent", "00-zz-zz-01")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", SAMPLED + "x" * 300)],
        [("traceparent", SAMPLED), ("traceparent", SAMPLED)],
    ],
)
def test_a_client_without_a_usable_traceparent_begins_a_trace(
    traced: LiveProxy, collector: Collector, fields: list[tuple[str, str]]
) -> None:
    answer = traced.get("/v1/models", headers=[("authorization", f"Bearer {KEY}"), *fields])
    span = collector.wait_for(answer.headers["x-proxy-request-id"])[0]
    assert span.parent_span_id == b""
    assert span.trace_id.hex() != TRACE


def test_what_a_client_does_not_sample_is_not_sent(traced: LiveProxy, collector: Collector) -> None:
    unsampled = ask(traced, traceparent=f"00-{TRACE}-{PARENT}-00")
    collector.wait_for(ask(traced, traceparent=SAMPLED))
    assert unsampled.encode() not in b"".join(collector.requests)


@pytest.mark.parametrize(("script", "status", "error"), [(fail, 500, "500"), (drop, 502, "upstream_error")])
def test_what_fails_is_an_error(
    traced: LiveProxy, upstream: FakeUpstream, collector: Collector, script: object, status: int, error: str
) -> None:
    upstream.script = script  # type: ignore[assignment]
    span, child = collector.wait_for(ask(traced))
    for part in (span, child):
        assert part.status.code == Status.STATUS_CODE_ERROR
        assert attributes_of(part)["error.type"] == error
    assert attributes_of(span)["http.response.status_code"] == status
    assert ("http.response.status_code" in attributes_of(child)) == (script is fail)


def test_what_the_gateway_refuses_has_no_upstream(upstream: FakeUpstream, collector: Collector) -> None:
    environment = {"OTEL_ENABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "ALLOWED_MODELS": "other"}
    environment |= {"OTEL_BSP_SCHEDULE_DELAY": "50"}
    with LiveProxy(UPSTREAM_URL=upstream.url, **environment) as proxy:
        spans = collector.wait_for(ask(proxy))
    assert len(spans) == 1
    said = attributes_of(spans[0])
    assert (said["http.response.status_code"], said["error.type"]) == (403, "refused")
    assert said["gen_ai.request.model"] == "gpt-4o-mini"
    assert spans[0].status.code == Status.STATUS_CODE_UNSET


def test_paths_and_methods_of_nobodys_make_no_names(traced: LiveProxy, collector: Collector) -> None:
    odd = traced.request("PROPFIND", "/v1/of-my-own", headers={"Authorization": f"Bearer {KEY}"})
    span = collector.wait_for(odd.headers["x-proxy-request-id"])[0]
    assert span.name == "HTTP"
    assert attributes_of(span)["http.request.method"] == "_OTHER"
    assert "http.route" not in attributes_of(span)


def test_a_websocket_is_one_span_with_what_all_its_responses_used(traced: LiveProxy, collector: Collector) -> None:
    address = f"ws://127.0.0.1:{traced.port}/v1/realtime?model=gpt-realtime"
    headers = {"Authorization": "Bearer sk-sandbox", "traceparent": SAMPLED}
    tokens = []
    with connect(address, additional_headers=headers, proxy=None) as socket:
        assert socket.response is not None
        request_id = socket.response.headers["x-proxy-request-id"]
        for _ in range(2):
            socket.send(json.dumps({"type": "response.create"}))
            while (event := json.loads(socket.recv(PATIENCE_S)))["type"] != "response.done":
                pass
            tokens.append(event["response"]["usage"])
    spans = collector.wait_for(request_id)
    assert len(spans) == 1  # the sandbox is no upstream
    assert (spans[0].name, spans[0].parent_span_id.hex()) == ("GET /v1/realtime", PARENT)
    said = attributes_of(spans[0])
    assert said["http.response.status_code"] == 101
    assert said["gen_ai.request.model"] == "gpt-realtime"
    assert said["gen_ai.usage.output_tokens"] == sum(used["output_tokens"] for used in tokens)
    assert said["gen_ai.usage.input_tokens"] == sum(used["input_tokens"] for used in tokens)
    assert "error.type" not in said


def test_a_websocket_that_the_upstream_refuses_is_a_span_too(traced: LiveProxy, collector: Collector) -> None:
    address = f"ws://127.0.0.1:{traced.port}/v1/realtime?model=gpt-realtime"
    with pytest.raises(InvalidStatus) as refused:
        connect(address, additional_headers={"Authorization": f"Bearer {KEY}"}, proxy=None)
    span = collector.wait_for(refused.value.response.headers["x-proxy-request-id"])[0]
    assert attributes_of(span)["http.response.status_code"] == 200


def test_what_is_left_is_sent_when_a_worker_stops(upstream: FakeUpstream) -> None:
    upstream.script = answer
    with Collector() as collector:
        environment = {"OTEL_ENABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        environment |= {"OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_SERVICE_NAME": "mine"}
        with LiveProxy(UPSTREAM_URL=upstream.url, **environment) as proxy:
            request_id = ask(proxy)
            assert collector.requests == []
            assert proxy.stop() == 0
        collector.wait_for(request_id)
        assert collector.services == {"mine"}


def test_a_collector_that_is_away_disturbs_nobody_and_is_told_of_once(upstream: FakeUpstream) -> None:
    upstream.script = answer
    port = free_port()
    environment = {"OTEL_ENABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    # Batches of one and a short queue: each request fails by itself, and most find no room.
    environment |= {"OTEL_BSP_MAX_QUEUE_SIZE": "2", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}
    environment |= {"OTEL_EXPORTER_OTLP_TIMEOUT": "1", "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with LiveProxy(UPSTREAM_URL=upstream.url, **environment) as proxy:
        wait_until_said(proxy, "traces are lost until the collector takes them")
        statuses = {proxy.post("/v1/chat/completions", json=ASKED).status_code for _ in range(50)}
        assert statuses == {200}
        proxy.wait_for_rows("SELECT 1 FROM billing_usagerecord WHERE output_tokens = 7", 50)
        with Collector(port):
            wait_until_said(proxy, "the collector takes traces again")
        assert proxy.stop() == 0
        lines = [line for line in proxy.log.splitlines() if "opentelemetry" in line or "proxysite.tracing" in line]
    assert len(lines) == 2, lines


def wait_until_said(proxy: LiveProxy, words: str) -> None:
    """Return once the proxy has logged the words; ask it for something meanwhile, so that there is what to trace."""
    for _ in range(int(PATIENCE_S * 100)):
        proxy.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        if words in proxy.log:
            return
    raise AssertionError(proxy.log[-3000:])


# Without it


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {"PATH": os.environ["PATH"], "VAR_DIR": os.environ["VAR_DIR"]}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_while_it_is_off_nothing_of_it_is_imported() -> None:
    # redis-py imports its metrics where they are installed.
    done = python("import sys, proxysite.asgi; print(sorted(sys.modules))")
    assert "proxysite.application" in done.stdout, done.stderr
    assert not re.search(r"proxysite\.tracing|opentelemetry\.(exporter|sdk\.trace)", done.stdout)


def test_a_start_without_the_packages_says_what_is_missing() -> None:
    without = "import sys; sys.modules['opentelemetry'] = None; from proxysite import settings"
    assert python(without).returncode == 0
    stopped = python(without, OTEL_ENABLED="true")
    assert stopped.returncode != 0
    assert re.search(r"ImproperlyConfigured: OTEL_ENABLED: opentelemetry\S* is not installed", stopped.stderr)
    assert "requirements-otel.txt" in stopped.stderr
