from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from gateway.tests.live import ROOT
from proxysite import env

_READERS = re.compile(r'env\.(?:text|choice|flag|whole|seconds|url|words|secret|amount)\(\s*"([A-Z_]+)"')


def variables_in_code() -> set[str]:
    return set(_READERS.findall((ROOT / "proxysite/settings.py").read_text()))


def variables_in(readme: str) -> set[str]:
    return set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / readme).read_text(), re.M))


def test_every_setting_stands_in_the_readmes_table_and_nothing_else_does() -> None:
    assert variables_in_code() == variables_in("README.md")
    assert len(variables_in_code()) > 20


def test_the_environment_is_read_in_one_place_only() -> None:
    allowed = {
        Path("proxysite/env.py"),
        Path("proxysite/asgi.py"),
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
        (lambda: env.url("X_TEST", schemes=("https",)), "http://x"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://x:99999"),
        (lambda: env.url("X_TEST", schemes=("https",)), "https://[x"),
    ],
)
def test_a_wrong_value_is_refused_by_name(read: object, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_TEST", value)
    with pytest.raises(ImproperlyConfigured, match="X_TEST"):
        read()  # type: ignore[operator]


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
    secrets = {process.communicate(timeout=60)[0] for process in processes}
    assert secrets == {path.read_bytes()}
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_secret_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("short")
    with pytest.raises(ImproperlyConfigured, match="X_TEST"):
        env.secret("X_TEST", tmp_path / "secret")
