"""`manage.py doctor --url` on the ways that clients come: well configured ones, and ones with one thing wrong each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trustme

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy, free_port
from proxysite.tests.examination import examine, refuse, run, said, trouble
from proxysite.tests.fronts import NGINX, Nginx

WELL_CONFIGURED = """
    proxy_http_version 1.1;
    proxy_buffering off;
    proxy_request_buffering off;
    client_max_body_size 0;
    proxy_read_timeout 600s;
    proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection $connection_upgrade;
"""
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian package nginx-light)")


@needs_nginx
def test_a_well_configured_nginx_is_found_well(sound: LiveProxy, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Nginx(sound.port, WELL_CONFIGURED, authority=authority, http2=True) as front:
        report = examine(sound, "--url", front.url, "--ca-file", str(tmp_path / "ca.pem"), code=0)
    assert trouble(report) == {}
    assert "HTTP/2" in said(report, "http")
    assert "nginx in front" in said(report, "address")
    public = {"address", "http", "metrics", "key", "streams", "answers", "uploads", "size", "websocket", "errors"}
    assert public <= set(report)


@needs_nginx
def test_an_nginx_that_buffers_everything_is_found_out(sound: LiveProxy) -> None:
    location = "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering; client_max_body_size 0;"
    with Nginx(sound.port, location) as front:
        report = examine(sound, "--url", front.url, code=2)
        elsewhere = examine(sound, "--url", front.url, code=2, PORT="9")
    assert trouble(report) == {"streams": "error", "answers": "warning", "uploads": "warning", "websocket": "error"}
    assert "proxy_buffering off" in said(report, "streams")
    assert "held back by nginx" in said(report, "streams")
    assert f"at {sound.url}, they come one by one" in said(report, "streams")
    assert "does not answer here" in said(elsewhere, "streams")
    assert "Upgrade $http_upgrade" in said(report, "websocket")
    assert "Cloudflare" not in json.dumps(report)


@needs_nginx
def test_an_nginx_as_it_comes_passes_event_streams_only(sound: LiveProxy) -> None:
    with Nginx(sound.port, "proxy_buffering on;") as front:
        report = examine(sound, "--url", front.url, code=2)
    found = {"answers": "warning", "uploads": "warning", "size": "warning", "websocket": "error"}
    assert trouble(report) == found
    assert "client_max_body_size" in said(report, "size")


@needs_nginx
@pytest.mark.parametrize(
    ("part", "level", "location"),
    [
        ("uploads", "warning", WELL_CONFIGURED.replace("proxy_request_buffering off", "proxy_request_buffering on")),
        ("size", "warning", WELL_CONFIGURED.replace("client_max_body_size 0", "client_max_body_size 10m")),
        ("answers", "warning", WELL_CONFIGURED.replace("proxy_buffering off", "proxy_buffering on")),
        ("errors", "error", WELL_CONFIGURED + "proxy_intercept_errors on; error_page 503 =503 /50x.html;"),
        ("websocket", "error", WELL_CONFIGURED.replace("$connection_upgrade", "close")),
    ],
)
def test_one_wrong_line_of_nginx_is_one_finding(sound: LiveProxy, part: str, level: str, location: str) -> None:
    with Nginx(sound.port, location) as front:
        report = examine(sound, "--url", front.url, code=2 if level == "error" else 1)
    assert trouble(report) == {part: level}
    assert "nginx: " in said(report, part)


@needs_nginx
def test_tls_without_http2_is_a_warning(sound: LiveProxy, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Nginx(sound.port, WELL_CONFIGURED, authority=authority) as front:
        report = examine(sound, "--url", front.url, "--ca-file", str(tmp_path / "ca.pem"), code=1)
        untrusted = examine(sound, "--url", front.url, code=2)
    assert trouble(report) == {"http": "warning"}
    assert trouble(untrusted) == {"address": "error"}
    assert "--ca-file" in said(untrusted, "address")


def test_the_gateways_own_address_is_well(sound: LiveProxy) -> None:
    report = examine(sound, "--url", sound.url + "/v1/", code=0)
    assert trouble(report) == {}


def test_metrics_that_anybody_may_read_are_an_error(upstream: FakeUpstream) -> None:
    upstream.script = refuse
    with LiveProxy(UPSTREAM_URL=upstream.url, SANDBOX_ENABLED="true", METRICS_NETWORKS="0.0.0.0/0") as proxy:
        other = {"HOST": "127.0.0.2", "JOURNAL_MAX_BYTES": "2000000"}  # so that the address is not the gateway's own
        report = examine(proxy, "--url", proxy.url, code=2, **other)
    assert trouble(report) == {"metrics": "error", "beat": "warning"}
    assert "METRICS_TOKEN" in said(report, "metrics")


def test_an_address_where_nobody_or_somebody_else_is(sound: LiveProxy, upstream: FakeUpstream) -> None:
    nobody = examine(sound, "--url", f"http://127.0.0.1:{free_port()}", code=2)
    assert "cannot be reached" in said(nobody, "address")
    other = examine(sound, "--url", upstream.url, code=2)
    assert "something else answers" in said(other, "address")
    assert trouble(nobody) == trouble(other) == {"address": "error"}


async def _as_openai(exchange: Exchange) -> None:
    if exchange.request.target == "/v1/chat/completions":
        await exchange.read_body()
        await exchange.start_stream()
        for number in range(20):
            await exchange.chunk(b'data: {"choices": [], "n": %d}\n\n' % number)
        await exchange.end_stream()
    else:
        await refuse(exchange) if exchange.request.value("authorization") is None else await exchange.answer(b"{}")


def test_a_key_of_the_upstreams_is_used_and_never_shown(sound: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = _as_openai
    done = run(sound, "--url", sound.url, "--key", "-", "--model", "gpt-x", stdin="sk-doctor-0123456789\n")
    assert "ok       streams      20 events" in done.stdout, done.stdout
    assert "sk-doctor" not in done.stdout + done.stderr
    asked = [request for request in upstream.requests if b'"stream":true' in bytes(request.body).replace(b" ", b"")]
    assert json.loads(bytes(asked[0].body))["model"] == "gpt-x"
    assert asked[0].value("authorization") == "Bearer sk-doctor-0123456789"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--key", "sk-wrong-key-0000000"], "Give a key that the upstream accepts"), ([], "Give --key")],
)
def test_a_key_that_is_refused_ends_it(
    sound: LiveProxy, upstream: FakeUpstream, arguments: list[str], words: str
) -> None:
    environment = {} if arguments else {"SANDBOX_ENABLED": "false"}
    report = examine(sound, "--url", sound.url, *arguments, code=2, **environment)
    assert words in json.dumps(report)


def test_an_address_that_is_none_is_refused(sound: LiveProxy) -> None:
    assert "--url is an address" in run(sound, "--url", "api.example.com").stderr
