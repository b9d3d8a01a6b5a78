from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from gateway.tests.live import ROOT
from proxysite import env

_READERS = re.compile(
    r'env\.(?:text|choice|flag|whole|seconds|url|words|networks|secret|amount|proxies|certificates|host)\(\s*"([A-Z_]+)"'
)


def variables_in_code() -> set[str]:
    return set(_READERS.findall((ROOT / "proxysite/settings.py").read_text()))


def variables_in(readme: str) -> set[str]:
    return set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / readme).read_text(), re.M))


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_every_setting_stands_in_the_readmes_table_and_nothing_else_does(readme: str) -> None:
    assert variables_in_code() == variables_in(readme)
    assert len(variables_in_code()) > 20


def test_the_environment_is_read_in_one_place_only() -> None:
    allowed = {
        Path("proxysite/env.py"),
        Path("proxysite/asgi.py"),
        Path("proxysite/celery.py"),
        Path("proxysite/ledger_process.py"),
        Path("manage.py"),
        Path("conftest.py"),
    }
    readers = {
        path.relative_to(ROOT)
        for app in ("proxysite", "gateway", "billing", "sessions_api")
        for path in (ROOT / app).rglob("*.py")
        if "tests" not in path.parts and re.search(r"os\.environ|getenv", path.read_text())
    }
    assert readers <= allowed


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda: env.flag("X_TEST", False), "maybe"),
        (lambda: env.whole("X_TEST", 1), "1.5"),
        (lambda: env.whole("X_TEST", 1, least=1, most=9), "10"),
        (lambda: env.seconds("X_TEST", 1), "0"),
        (lambda: env.seconds("X_TEST", 1), "nan"),
        (lambda: env.seconds("X_TEST", 1), "soon"),
        (lambda: env.choice("X_TEST", "a", choices=("a", "b")), "c"),
        (lambda: env.networks("X_TEST"), "10.0.0.1/8"),
        (lambda: env.networks("X_TEST"), "here"),
        (lambda: env.url("X_TEST", schemes=("https",)), "http://x"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://x:99999"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://[x"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://x y"),
        (lambda: env.url("X_TEST", schemes=("https",), is_base=True), "https://x/?a=b"),
        (lambda: env.url("X_TEST", schemes=("https",), is_base=True), "https://x#a"),
        (lambda: env.url("X_TEST", schemes=("https",), is_base=True), "https://user:hunter2@x"),
        (lambda: env.proxies("X_TEST", ()), "10.0.0.1/8"),
        (lambda: env.proxies("X_TEST", ()), "127.0.0.1,nginx"),
        (lambda: env.certificates("X_TEST"), "/nonexistent/ca.pem"),
        (lambda: env.certificates("X_TEST"), __file__),
        (lambda: env.amount("X_TEST", "0"), "0.00000001"),
        (lambda: env.amount("X_TEST", "0"), "much"),
        (lambda: env.host("X_TEST", "::"), "999.1.1.1"),
        (lambda: env.host("X_TEST", "::"), "." * 80),
    ],
)
def test_a_wrong_value_is_refused_by_name(read: object, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TEST", value)
    with pytest.raises(ImproperlyConfigured, match="X_TEST"):
        read()  # type: ignore[operator]


def test_a_file_that_is_no_text_is_refused_without_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(b"hunter2\xff")
    monkeypatch.setenv("X_TEST_FILE", str(tmp_path / "secret"))
    with pytest.raises(ImproperlyConfigured, match="X_TEST_FILE") as raised:
        env.text("X_TEST")
    assert raised.value.__cause__ is None
    with pytest.raises(ImproperlyConfigured, match="X_OTHER"):
        env.secret("X_OTHER", tmp_path / "secret")


def settings_of(**environment: str) -> subprocess.CompletedProcess[str]:
    script = "import json; from proxysite import settings; print(json.dumps(settings.DATABASES, default=str))"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "VAR_DIR": os.environ["VAR_DIR"], **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_wrong_setting_is_said_in_one_line() -> None:
    command = [sys.executable, "manage.py", "check"]
    stopped = subprocess.run(command, cwd=ROOT, env=os.environ | {"PORT": "many"}, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert stopped.stderr == "manage.py: PORT: 'many' is not a whole number.\n"


@pytest.mark.parametrize(
    "address",
    [
        "hunter2",
        "//user:hunter2@host/name",
        "mysql://user:hunter2@host/name",
        "postgres://user:hunter2@host",
        "postgres://user:hunter2@host:port/name",
        "sqlite://:memory:",
    ],
)
def test_a_database_that_cannot_be_used_stops_the_start(address: str) -> None:
    stopped = settings_of(DATABASE_URL=address)
    assert stopped.returncode != 0
    assert "ImproperlyConfigured: DATABASE_URL: " in stopped.stderr
    assert "hunter2" not in stopped.stderr + stopped.stdout


def test_what_a_database_address_asks_for_beside_the_pool_is_kept() -> None:
    done = settings_of(DATABASE_URL="postgres://user:secret@host/name?sslmode=require&connect_timeout=3")
    options = json.loads(done.stdout)["default"]["OPTIONS"]
    assert options["sslmode"] == "require"
    assert options["connect_timeout"] in (3, "3")
    assert options["tcp_user_timeout"] == 60_000  # as nobody asked for less
    assert options["pool"]["max_size"] == 8


def test_an_sqlite_file_elsewhere_is_kept_like_our_own(tmp_path: Path) -> None:
    ours = json.loads(settings_of().stdout)["default"]
    elsewhere = json.loads(settings_of(DATABASE_URL=f"sqlite:///{tmp_path}/ledger.db").stdout)["default"]
    assert elsewhere == ours | {"NAME": f"{tmp_path}/ledger.db"}
    assert "WAL" in elsewhere["OPTIONS"]["init_command"]


def test_a_password_in_a_wrong_address_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TEST", "ftp://user:hunter2@host")
    with pytest.raises(ImproperlyConfigured) as raised:
        env.url("X_TEST", schemes=("https",))
    assert "hunter2" not in str(raised.value)


def test_a_value_may_stand_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    monkeypatch.setenv("X_TEST_FILE", str(tmp_path / "secret"))
    assert env.text("X_TEST") == "from-file"
    monkeypatch.setenv("X_TEST", "direct")
    assert env.text("X_TEST") == "direct"
    monkeypatch.delenv("X_TEST")
    monkeypatch.setenv("X_TEST_FILE", str(tmp_path / "missing"))
    with pytest.raises(ImproperlyConfigured, match="X_TEST_FILE"):
        env.text("X_TEST")


def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TEST", "")
    assert env.whole("X_TEST", 7) == 7
    assert env.words("X_TEST", ("a", "b")) == ["a", "b"]


def test_two_processes_that_start_together_agree_on_one_secret(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from proxysite import env;"
        "sys.stdout.write(env.secret('X_TEST', Path(sys.argv[1])))"
    )
    path = tmp_path / "secret"
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(6)
    ]
    secrets = {process.communicate(timeout=240)[0] for process in processes}
    assert secrets == {path.read_bytes()}
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_secret_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("short")
    with pytest.raises(ImproperlyConfigured, match="X_TEST"):
        env.secret("X_TEST", tmp_path / "secret")
