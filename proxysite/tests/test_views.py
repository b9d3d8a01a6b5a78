"""The site beside /v1: health, and what operators set between here and the upstream."""

from __future__ import annotations

import re
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from gateway.tests.egress_proxies import ConnectProxy, EgressProxy, Socks5Proxy
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy, instance


def test_the_printed_line_works_and_streams(own_proxy: LiveProxy) -> None:
    line = next(line.strip() for line in own_proxy.log.splitlines() if line.strip().startswith("curl"))
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("data: ") > 3


def test_healthz_answers_while_the_process_lives(own_proxy: LiveProxy) -> None:
    assert own_proxy.get("/healthz").json() == {"status": "ok"}


def test_readyz_is_only_looked_at(own_proxy: LiveProxy) -> None:
    assert own_proxy.post("/readyz").status_code == 405
    assert own_proxy.request("HEAD", "/readyz").status_code == 200


def test_readyz_is_green_on_a_fresh_instance(own_proxy: LiveProxy) -> None:
    answer = own_proxy.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ok"
    assert {"database", "migrations", "cache", "journal"} <= set(answer.json()["checks"])


def _remove_database(proxy: LiveProxy) -> None:
    proxy.environment["DATABASE_URL"] = "postgres://nobody:secret@127.0.0.1:9/none"


def _unmigrate(proxy: LiveProxy) -> None:
    proxy.manage("migrate", "admin", "zero")


def _break_cache(proxy: LiveProxy) -> None:
    proxy.environment["REDIS_URL"] = "redis://127.0.0.1:9/0"


def _break_journal(proxy: LiveProxy) -> None:
    proxy.environment["JOURNAL_DIR"] = "/proc/journal"


@pytest.mark.parametrize(
    ("part", "break_it"),
    [("database", _remove_database), ("migrations", _unmigrate), ("cache", _break_cache), ("journal", _break_journal)],
)
def test_readyz_says_which_part_is_bad(part: str, break_it: Callable[[LiveProxy], None]) -> None:
    with instance() as proxy:
        break_it(proxy)
        proxy.start()
        asked_at = time.monotonic()
        answer = proxy.get("/readyz")
        # Whoever asks, such as Kubernetes, has given up long before the 30 s of the database's own patience end.
        assert time.monotonic() - asked_at < 20
        assert proxy.get("/healthz").status_code == 200
    assert answer.status_code == 503
    assert answer.json()["checks"][part] != "ok"
    assert "secret" not in answer.text


def test_the_admin_asks_for_a_login(own_proxy: LiveProxy) -> None:
    answer = own_proxy.get("/admin/", follow_redirects=True)
    assert answer.status_code == 200
    assert 'name="password"' in answer.text


def test_the_admins_styles_are_served(own_proxy: LiveProxy) -> None:
    page = own_proxy.get("/admin/login/").text
    styles = re.findall(r'href="(/static/[^"]+\.css)"', page)
    assert styles
    assert {own_proxy.get(style).status_code for style in styles} == {200}


def test_a_huge_body_never_reaches_the_site(own_proxy: LiveProxy) -> None:
    assert own_proxy.post("/admin/login/", content=b"x" * (9 << 20)).status_code == 413


@pytest.mark.parametrize("transport", ["own", "httpx"])
@pytest.mark.parametrize("kind", [ConnectProxy, Socks5Proxy])
def test_an_egress_proxy_with_a_password_is_used(
    upstream: FakeUpstream, kind: type[EgressProxy], transport: str
) -> None:
    authority = trustme.CA()
    tls = _server_context(authority)
    with FakeUpstream(tls=tls) as secure, kind(user="user", password="password") as egress:
        with (
            authority.cert_pem.tempfile() as ca_file,
            LiveProxy(
                UPSTREAM_URL=secure.url,
                UPSTREAM_PROXY=egress.url(),
                UPSTREAM_CA_FILE=ca_file,
                UPSTREAM_TRANSPORT=transport,
            ) as proxy,
        ):
            assert proxy.get("/v1/models").status_code == 200
        assert secure.requests[0].target == "/v1/models"
        assert egress.asked_for == [("127.0.0.1", secure.port)]


@pytest.mark.parametrize("transport", ["own", "httpx"])
def test_an_upstream_with_an_unknown_certificate_is_not_trusted(transport: str) -> None:
    with FakeUpstream(tls=_server_context(trustme.CA())) as secure:
        with LiveProxy(UPSTREAM_URL=secure.url, UPSTREAM_TRANSPORT=transport) as proxy:
            assert proxy.get("/v1/models").status_code == 502
        assert not secure.requests


def _server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def test_a_base_path_stands_before_v1(upstream: FakeUpstream) -> None:
    for base in ("/openai", "/openai/v1", "/openai/v1/"):
        with LiveProxy(UPSTREAM_URL=upstream.url + base) as proxy:
            assert proxy.get("/v1/models?x=1").json()["target"] == "/openai/v1/models?x=1"


def test_no_key_and_no_body_is_in_any_file_or_log(own_proxy: LiveProxy, upstream: FakeUpstream) -> None:
    key, secret = "sk-test-grep-for-this-key", "grep for this body"
    headers = {"Authorization": f"Bearer {key}"}
    for target in ("/v1/chat/completions", f"/v1/models?apiKey={key}", f"/pro/balance?apiKey={key}", "/v1/../x"):
        own_proxy.post(target, headers=headers, json={"messages": [{"role": "user", "content": secret}]})
    upstream.script = _vanish
    own_proxy.post("/v1/chat/completions", headers=headers, json={"content": secret})
    found = [path for path in own_proxy.var_dir.rglob("*") if path.is_file() and _holds(path, key, secret)]
    assert not found


async def _vanish(exchange: object) -> None:
    exchange.abort()  # type: ignore[attr-defined]


def _holds(path: Path, *texts: str) -> bool:
    content = path.read_bytes()
    return any(text.encode() in content for text in texts)
