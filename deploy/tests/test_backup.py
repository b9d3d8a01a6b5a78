"""The commands of docs/operating.md, as they stand there: what they save is what they bring back."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.tests.traffic import MESSAGES, MODEL, USD_EACH, Numbered, new_client, recorded, wait_until
from deploy.topology import HEALTHY_WITHIN_S, ROOT, Topology
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEYS = ["sk-backup-first", "sk-backup-second"]
BODY = {"model": MODEL, "messages": MESSAGES}
IN_POSTGRES = "docker compose exec -T postgres "


def documented(name: str) -> list[str]:
    """Return the lines of the block of commands that has this name in the page."""
    page = (ROOT / "docs" / "operating.md").read_text()
    found = re.search(rf"<!-- {name} -->\n```sh\n(.*?)```", page, re.S)
    assert found, name
    return found[1].splitlines()


def run(line: str, directory: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(["sh", "-c", line], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# SQLite


def sqlite_balances(proxy: LiveProxy) -> list[Any]:
    return [proxy.get("/pro/balance", headers=bearer(key)).json() for key in KEYS]


@pytest.fixture
def upstream() -> Any:
    with FakeUpstream(Numbered()) as server:
        yield server


def test_a_restored_sqlite_says_the_same_balances(upstream: FakeUpstream, tmp_path: Path) -> None:
    lost, fresh = tmp_path / "lost", tmp_path / "fresh"
    for home in (lost, fresh):
        (home / "var").mkdir(parents=True)
        (home / ".venv").symlink_to(ROOT / ".venv")
    only_sqlite = {"DATABASE_URL": "", "REDIS_URL": "", "UPSTREAM_URL": upstream.url, "DEFAULT_GRANT_USD": "10"}
    with LiveProxy(var_dir=lost / "var", **only_sqlite) as proxy:
        for key in [*KEYS, KEYS[0]]:
            assert proxy.post("/v1/chat/completions", json=BODY, headers=bearer(key)).status_code == 200
        proxy.wait_for_rows("SELECT event_id FROM billing_usagerecord", 3)
        before = sqlite_balances(proxy)
        for line in documented("backup: sqlite"):
            run(line, lost, dict(os.environ))
        # After the backup, and so not in it.
        assert proxy.post("/v1/chat/completions", json=BODY, headers=bearer(KEYS[0])).status_code == 200
    assert [answer["data"]["used"] for answer in before] == [2 * USD_EACH, USD_EACH]
    (lost / "backup").rename(fresh / "backup")
    for line in documented("restore: sqlite"):
        run(line, fresh, dict(os.environ))
    with LiveProxy(var_dir=fresh / "var", **only_sqlite) as proxy:
        assert sqlite_balances(proxy) == before
    (fresh / "var" / "key_pepper").unlink()
    with LiveProxy(var_dir=fresh / "var", **only_sqlite) as proxy:
        # Which is why the pepper is a part of every backup.
        assert proxy.get("/pro/balance", headers=bearer(KEYS[0])).status_code == 404


# PostgreSQL


def balances(topology: Topology) -> list[Any]:
    with new_client(topology) as client:
        return [client.get("/pro/balance", headers=bearer(key)).json() for key in KEYS]


def run_documented(name: str, topology: Topology, environment: dict[str, str]) -> None:
    """Run a block of commands; what it asks of an engine, the topology does."""
    for line in documented(name):
        words = shlex.split(line)
        if words[:3] == ["docker", "compose", "stop"]:
            for member in [member for service in words[3:] for member in topology.services.get(service, [])]:
                member.stop()
        elif words[:3] == ["docker", "compose", "up"]:
            stopped = [member for members in topology.services.values() for member in members if not member.is_running]
            for member in [member for member in stopped if "migrate" not in member.name]:
                member.start()
                member.wait_healthy(HEALTHY_WITHIN_S)
        else:
            run(line.removeprefix(IN_POSTGRES), topology.directory, environment)


def test_a_restored_postgresql_says_the_same_balances(
    topology: Topology, topology_upstream: FakeUpstream, tmp_path: Path
) -> None:
    topology_upstream.script = Numbered()
    password = (topology.secrets / "postgres_password").read_text().strip()
    environment = topology.environment_of("postgres") | {"PGPASSWORD": password}
    with new_client(topology) as client:
        for key in [*KEYS, KEYS[0]]:
            assert client.post("/v1/chat/completions", json=BODY, headers=bearer(key)).status_code == 200
        wait_until(lambda: sum(recorded(topology).values()) == 3, "all requests in the ledger")
        before = balances(topology)
        assert [answer["data"]["used"] for answer in before] == [2 * USD_EACH, USD_EACH]
        run_documented("backup: postgres", topology, environment)
        # After the backup, and so not in it.
        assert client.post("/v1/chat/completions", json=BODY, headers=bearer(KEYS[0])).status_code == 200
        wait_until(lambda: sum(recorded(topology).values()) == 4, "the last request in the ledger")
    run_documented("restore: postgres", topology, environment)
    assert balances(topology) == before
    saved = topology.directory / "backup" / "secrets" / "key_pepper"
    assert saved.read_text() == (topology.secrets / "key_pepper").read_text()
