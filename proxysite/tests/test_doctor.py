"""`manage.py doctor` on running instances that are well, and on ones with one thing wrong each."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import ssl
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from gateway.tests.egress_proxies import ConnectProxy, Socks5Proxy
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.redis_server import running_redis
from proxysite.doctor.findings import Finding, as_json, as_text, exit_code, findings_of
from proxysite.doctor.fronts import cure_for, front_of
from proxysite.doctor.timing import Arrivals
from proxysite.tests.examination import examine, refuse, run, said, trouble

# The instance


def test_a_sound_instance_is_found_sound(sound: LiveProxy, upstream: FakeUpstream) -> None:
    report = examine(sound, code=0)
    assert set(report) == {"settings", "secrets", "database", "redis", "beat", "journal", "upstream", "clock"}
    assert trouble(report) == {}
    assert upstream.requests[-1].target == "/v1/models"
    assert upstream.requests[-1].value("authorization") is None


def test_findings_are_printed_with_their_cures(sound: LiveProxy) -> None:
    done = run(sound, DEBUG="true", PUBLIC_URL="https://api.example.com")
    assert done.returncode == 2
    assert "error    settings     DEBUG shows" in done.stdout
    assert "→ Unset DEBUG." in done.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        [
            ("settings", "warning", "host name", {"HOST": "0.0.0.0"}),
            ("secrets", "error", "KEY_PEPPER can be guessed", {"KEY_PEPPER": "x" * 50}),
            ("redis", "error", "REDIS_URL", {"REDIS_URL": "redis://:hunter2@127.0.0.1:9/0"}),
            ("journal", "error", "cannot be written", {"JOURNAL_DIR": "/proc/journal"}),
            ("upstream", "error", "has no address", {"UPSTREAM_URL": "https://nowhere.invalid"}),
        ],
        [
            ("settings", "warning", "in the clear: PUBLIC_URL", {"PUBLIC_URL": "http://api.example.com"}),
            (
                "secrets",
                "error",
                "are the same",
                {"KEY_PEPPER": "0123456789abcdef" * 3, "SECRET_KEY": "0123456789abcdef" * 3},
            ),
            ("broker", "error", "CELERY_BROKER_URL", {"CELERY_BROKER_URL": "redis://:hunter2@127.0.0.1:9/1"}),
            ("journal", "warning", "MiB are free", {"JOURNAL_MAX_BYTES": str(2**60)}),
            ("upstream", "error", "cannot be connected to", {"UPSTREAM_URL": "http://127.0.0.1:9"}),
        ],
        [
            ("settings", "error", "TRUSTED_PROXIES", {"TRUSTED_PROXIES": "*"}),
            ("secrets", "error", "SESSION_KEYS can be guessed", {"SESSION_KEYS": "y" * 50}),
            ("broker", "error", "CELERY_BROKER_URL", {"CELERY_BROKER_URL": "amqp://user:hunter2@127.0.0.1:9/x"}),
            ("database", "error", "DATABASE_URL", {"DATABASE_URL": "postgres://user:hunter2@127.0.0.1:9/none"}),
            ("upstream", "error", "egress proxy cannot be reached", {"UPSTREAM_PROXY": "socks5://127.0.0.1:9"}),
        ],
        [
            ("settings", "warning", "METRICS_TOKEN", {"METRICS_TOKEN": "short"}),
            ("upstream", "error", "UPSTREAM_PROXY", {"UPSTREAM_PROXY": "http://nowhere.invalid:3128"}),
        ],
        [("settings", "warning", "billing.W001", {"WORKERS": "4", "REDIS_URL": ""})],
        [
            (
                "settings",
                "warning",
                "Set UPSTREAM_URL=http://127.0.0.1:9/openai",
                {"UPSTREAM_URL": "http://127.0.0.1:9/openai/v1/chat/completions"},
            ),
            ("upstream", "error", "cannot be connected to", {}),
        ],
        [
            (
                "settings",
                "error",
                "gateway.E001",
                {"WORKERS": "4", "REDIS_URL": "", "ADDRESS_CONCURRENT_STREAMS": "5"},
            )
        ],
    ],
)
def test_what_is_wrong_is_named_and_nothing_else(
    sound: LiveProxy, wrong: list[tuple[str, str, str, dict[str, str]]]
) -> None:
    environment = {name: value for *_, changed in wrong for name, value in changed.items()}
    levels = {part: level for part, level, _, _ in wrong}
    report = examine(sound, code=2 if "error" in levels.values() else 1, **environment)
    assert trouble(report) == levels
    for part, _, words, _ in wrong:
        assert words in said(report, part)
        assert len([level for level, _, _ in report[part] if level != "ok"]) == 1
    assert "hunter2" not in json.dumps(report)


@pytest.mark.parametrize("name", ["key_pepper", "session_keys"])
def test_a_file_that_others_may_read_is_named(sound: LiveProxy, name: str) -> None:
    secret = sound.var_dir / name
    secret.chmod(0o644)
    try:
        report = examine(sound, code=2)
    finally:
        secret.chmod(0o600)
    assert trouble(report) == {"secrets": "error"}
    assert f"chmod 600 {secret}" in said(report, "secrets")


def test_a_secrets_file_of_the_operators_own_is_looked_at_too(sound: LiveProxy, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdefghijklmnopqrstuvwxyz")
    secret.chmod(0o644)
    report = examine(sound, code=2, METRICS_TOKEN_FILE=str(secret))
    assert f"chmod 600 {secret}" in said(report, "secrets")
    secret.chmod(0o600)
    examine(sound, code=0, METRICS_TOKEN_FILE=str(secret))


def test_a_broker_that_answers_is_well(sound: LiveProxy) -> None:
    if not sound.environment.get("REDIS_URL"):
        pytest.skip("no Redis")
    report = examine(sound, code=0, CELERY_BROKER_URL=sound.environment["REDIS_URL"])
    assert report["broker"][0][0] == "ok"


def _full(client: redis.Redis) -> None:
    client.config_set("maxmemory", "1")


def _replica(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")


def _without_rights(client: redis.Redis) -> None:
    client.acl_setuser("default", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-@write"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_full, "OutOfMemoryError Raise Redis's maxmemory"),
        (_replica, "ReadOnlyError Let REDIS_URL name the primary"),
        (_without_rights, "NoPermissionError Let REDIS_URL's user write"),
    ],
)
def test_a_redis_that_answers_and_takes_no_writes_is_named(
    sound: LiveProxy, tmp_path: Path, spoil: Callable[[redis.Redis], None], words: str
) -> None:
    with running_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        assert trouble(examine(sound, code=0, REDIS_URL=url)) == {}
        assert client.dbsize() == 0
        spoil(client)
        report = examine(sound, code=2, REDIS_URL=url)
    assert trouble(report) == {"redis": "error"}
    assert words in said(report, "redis")


def test_pending_migrations_and_late_events_are_named(upstream: FakeUpstream) -> None:
    upstream.script = refuse
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_MAX_BYTES="2000000") as proxy:
        proxy.stop()
        proxy.manage("migrate", "admin", "zero")
        late = proxy.var_dir / "journal" / "gone-1-x.1.journal"
        late.write_bytes(b"x\n")
        os.utime(late, (0, 0))
        (proxy.var_dir / "journal" / "set-aside.lines").write_bytes(b"y\n")
        report = examine(proxy, code=2)
    assert trouble(report) == {"database": "error", "journal": "error", "beat": "warning"}
    assert "has never run" in said(report, "beat")
    assert "manage.py migrate" in said(report, "database")
    assert "the oldest for" in said(report, "journal")
    assert "1 usage events were refused" in said(report, "journal")


# The upstream


@contextlib.contextmanager
def secure_upstream(authority: trustme.CA) -> Iterator[FakeUpstream]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with FakeUpstream(refuse, tls=context) as upstream:
        yield upstream


def test_tls_is_looked_at_apart(sound: LiveProxy, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with secure_upstream(authority) as secure:
        report = examine(sound, code=2, UPSTREAM_URL=secure.url)
        assert "certificate is not trusted" in said(report, "upstream")
        assert "UPSTREAM_CA_FILE" in said(report, "upstream")
        report = examine(sound, code=0, UPSTREAM_URL=secure.url, UPSTREAM_CA_FILE=str(tmp_path / "ca.pem"))
        assert "TLSv1.3" in said(report, "upstream")
    report = examine(sound, code=2, UPSTREAM_URL=sound.environment["UPSTREAM_URL"].replace("http", "https"))
    assert "no TLS" in said(report, "upstream")


@pytest.mark.parametrize("kind", [ConnectProxy, Socks5Proxy])
def test_the_egress_proxy_is_gone_through(sound: LiveProxy, upstream: FakeUpstream, kind: Any) -> None:
    with kind(user="user", password="hunter2") as egress:
        report = examine(sound, code=0, UPSTREAM_PROXY=egress.url())
        assert egress.asked_for == [("127.0.0.1", upstream.port)]
        wrong = egress.url().replace("hunter2", "hunter3")
        refused = examine(sound, code=2, UPSTREAM_PROXY=wrong)
    assert "through" in said(report, "upstream")
    assert "egress proxy refuses" in said(refused, "upstream")
    assert "hunter" not in json.dumps(report) + json.dumps(refused)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("200 OK", "asks nobody for a key"),
        ("403 Forbidden", "countries"),
        ("404 Not Found", "path in UPSTREAM_URL"),
        ("503 No", "trouble"),
    ],
)
def test_an_answer_that_is_odd_is_a_warning(sound: LiveProxy, upstream: FakeUpstream, status: str, words: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.answer(b"{}", status=status)

    upstream.script = script
    report = examine(sound, code=1)
    assert trouble(report) == {"upstream": "warning"}
    assert words in said(report, "upstream")


async def _no_http(exchange: Exchange) -> None:
    await exchange.send(b"SSH-2.0-x\r\n")
    await exchange.close()


def test_what_is_no_http_server_is_told(sound: LiveProxy, upstream: FakeUpstream) -> None:
    upstream.script = _no_http
    assert "no HTTP answer" in said(examine(sound, code=2), "upstream")


@pytest.mark.parametrize(("offset_s", "level"), [(60, "warning"), (-3600, "error")])
def test_a_clock_that_is_off_is_told(sound: LiveProxy, upstream: FakeUpstream, offset_s: int, level: str) -> None:
    async def script(exchange: Exchange) -> None:
        date = format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=offset_s), usegmt=True)
        await exchange.answer(b"{}", status="401 No", headers=(("date", date),))

    upstream.script = script
    report = examine(sound, code=2 if level == "error" else 1)
    assert trouble(report) == {"clock": level}
    assert ("behind" if offset_s > 0 else "ahead of") in said(report, "clock")


# The parts


@pytest.mark.parametrize(
    ("times_s", "sent_s", "words"),
    [
        ([0.0, 0.3, 0.6, 0.9], 0.9, ""),
        ([0.9, 0.91, 0.92, 0.93], 0.9, "arrived within 0.0 s"),
        ([0.0, 0.0, 0.9, 0.9], 0.9, "at 2 moments"),
        ([], 0.9, "no events arrived"),
        ([5.0] * 20, None, "all at once"),
        ([5.0 + n / 10 for n in range(20)], None, ""),
        ([0.01] * 20, None, ""),
    ],
)
def test_arrivals_are_judged_by_when_they_were_sent(times_s: list[float], sent_s: float | None, words: str) -> None:
    arrivals = Arrivals()
    arrivals._times_s = [arrivals._began_s + at for at in times_s]
    found = arrivals.trouble(sent_s=sent_s, what="events")
    assert (words in found) if words else found == ""


@pytest.mark.parametrize(
    ("headers", "front"),
    [
        ({"server": "nginx/1.22.1"}, "nginx"),
        ({"server": "openresty"}, "nginx"),
        ({"server": "cloudflare", "cf-ray": "1"}, "Cloudflare"),
        ({"server": "awselb/2.0"}, "a load balancer"),
        ({"via": "1.1 google"}, "a load balancer"),
        ({}, ""),
    ],
)
def test_who_stands_in_front_is_told_by_its_answers(headers: dict[str, str], front: str) -> None:
    assert front_of(headers) == front
    cure = cure_for("stream", front)
    assert "nginx: " in cure
    assert ("Cloudflare: " in cure) == (front in ("Cloudflare", ""))


def test_a_check_that_fails_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("secret")

    found = list(findings_of([("part", broken)]))
    assert exit_code(found) == 2
    assert "secret" not in as_json(found) + as_text(found[0])
    assert exit_code([]) == 0
    assert exit_code([Finding("part", "warning", "x", "y")]) == 1
