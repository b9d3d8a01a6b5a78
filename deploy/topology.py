"""Start everything that docker-compose.yml starts, with its own commands, settings and health checks, without Docker.

`python -m deploy.topology` runs it on loopback until Ctrl-C: nginx, the gateways, web, worker, beat, PostgreSQL and
Redis, on free ports, with data in a directory of its own that is removed at the end. What differs from containers:

- names of services are 127.0.0.1 and a port; paths inside a container are below one directory (`Topology._places`)
- nginx gets its upstreams by address instead of from Docker's resolver (`Topology.route`)
- PostgreSQL and Redis are this machine's, not the images'; what the images' entry points do is in `deploy.programs`
- no image is built, nothing is isolated, limited or read-only
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy import programs
from deploy.compose import ServiceSpec, in_order, read_compose
from deploy.processes import Managed, Plan, StartError

ROOT = Path(__file__).resolve().parents[1]
COMPOSE_FILE = ROOT / "docker-compose.yml"
NGINX_FILES = ROOT / "deploy" / "nginx"
HEALTHY_WITHIN_S = 120.0
_KEPT_VARIABLES = ("HOME", "LANG", "TMPDIR")
_FRONT_NETWORK = "172.31.240.0/24"


class Topology:
    """`with Topology({"UPSTREAM_URL": …}) as topology:` serves at `topology.url` until the block ends.

    `settings` stand for the file .env; `gateways`, where given, says how many there are, with settings of each its own.
    `everywhere` stands in the environment of all programs, those of others too. With `journal_bytes` the journal has a
    disk of its own of that size (`programs.can_mount`). What ends by itself is started anew, as the engine would.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        gateways: Sequence[Mapping[str, str]] = (),
        everywhere: Mapping[str, str] | None = None,
        journal_bytes: int = 0,
    ) -> None:
        self.specs = read_compose(COMPOSE_FILE, os.environ)
        if importlib.util.find_spec("proxysite.celery") is None:
            self.specs = {name: spec for name, spec in self.specs.items() if name not in ("worker", "beat")}
        self.directory = Path(tempfile.mkdtemp(prefix="proxysite-topology-"))
        self.secrets = self.directory / "secrets"
        self.settings = {"REDIS_KEY_PREFIX": self.directory.name, **(settings or {})}
        self.services: dict[str, list[Managed]] = {}
        self.journal = self.directory / "journal"
        self._gateways = gateways
        self._everywhere = everywhere or {}
        self._journal_bytes = journal_bytes
        self._is_mounted = False
        self.http_port, self.https_port, self.postgres_port, self.redis_port = (free_port() for _ in range(4))
        self.url = f"https://127.0.0.1:{self.https_port}"
        self.certificate = self.secrets / "tls_certificate"
        # Not below our own directory: the database's user must be able to reach it.
        self._postgres_directory = Path(tempfile.gettempdir()) / f"{self.directory.name}-postgres"
        self._made = 0
        self._is_stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def __enter__(self) -> Topology:
        try:
            self._prepare()
            for group in in_order(self.specs):
                self._start_group(group)
            self._supervisor.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_stopping.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for group in reversed(in_order(self.specs)):
            members = [member for spec in group for member in self.services.get(spec.name, [])]
            stopping = [threading.Thread(target=member.stop) for member in members]
            for thread in stopping:
                thread.start()
            for thread in stopping:
                thread.join()
        if self._is_mounted:
            programs.unmount(self.journal)
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._postgres_directory, ignore_errors=True)

    # What tests and chaos do

    def one(self, name: str) -> Managed:
        """Return the first process of a service."""
        return self.services[name][0]

    def database_url(self) -> str:
        return (self.secrets / "database_url").read_text().strip()

    def environment_of(self, name: str) -> dict[str, str]:
        """Return the environment of a service's first process, for a management command with the same settings."""
        return dict(self.one(name).plan.environment)

    def manage(self, *arguments: str) -> str:
        """Run a management command in the place of `web`, and return what it printed."""
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=self.environment_of("web"),
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    def add(self, name: str, settings: Mapping[str, str] | None = None) -> Managed:
        """Start one more process of a service, with settings of its own, and wait until it is healthy."""
        member = self._member(self.specs[name], settings or {})
        member.start()
        member.wait_healthy(HEALTHY_WITHIN_S)
        self.services[name].append(member)
        return member

    def route(self, gateways: list[Managed] | None = None) -> None:
        """Tell nginx which gateways there are; without a list, all."""
        upstreams = {"gateway": gateways or self.services["gateway"], "web": self.services["web"]}
        text = (NGINX_FILES / "upstreams.conf").read_text()
        text = re.sub(r"^resolver .*\n", "", text, flags=re.M)
        for name, members in upstreams.items():
            lines = [
                f"server 127.0.0.1:{member.plan.environment['PORT']} max_fails=1 fail_timeout=2s;" for member in members
            ]
            text = re.sub(rf"server {name}:.*;", "\n    ".join(lines), text)
        (self.directory / "nginx" / "upstreams.conf").write_text(text)

    def reload_nginx(self) -> None:
        """Make nginx read its files anew; streams that run go on. Returns once the new workers serve."""
        nginx = self.one("nginx")
        before = _children(nginx.pid)
        nginx.send(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while not _children(nginx.pid) - before:
            if time.monotonic() > deadline:
                raise StartError(f"nginx did not reload:\n{nginx.log[-3000:]}")
            time.sleep(0.02)

    # Start

    def _prepare(self) -> None:
        if missing := programs.missing_programs():
            raise StartError(f"missing: {', '.join(missing)}. {programs.HOW_TO_GET_THEM}")
        for name in ("journal", "nginx", "tmp"):
            (self.directory / name).mkdir(mode=0o700)
        if self._journal_bytes:
            programs.mount_memory(self.journal, self._journal_bytes)
            self._is_mounted = True
        environment = {"PATH": programs.search_path(), "POSTGRES_ADDRESS": f"127.0.0.1:{self.postgres_port}"}
        subprocess.run(["sh", "deploy/make-secrets.sh", str(self.secrets)], cwd=ROOT, env=environment, check=True,
                       capture_output=True)  # fmt: skip
        programs.prepare_database(self._postgres_directory, self.secrets / "postgres_password")
        text = self._moved((NGINX_FILES / "nginx.conf").read_text(), self._places("nginx", self.directory))
        if os.geteuid() == 0:  # its workers would be somebody who cannot read our directory
            text = f"user root;\n{text}"
        (self.directory / "nginx" / "nginx.conf").write_text(text)

    def _start_group(self, group: list[ServiceSpec]) -> None:
        for spec in group:
            members = self.services[spec.name] = [self._member(spec, own) for own in self._replicas(spec)]
            if spec.name == "nginx":
                self.route()
            for member in members:
                if not spec.is_one_shot:
                    member.start()
                else:
                    member.run_to_end(HEALTHY_WITHIN_S)
        if any(spec.name == "postgres" for spec in group):
            password = (self.secrets / "postgres_password").read_text().strip()
            programs.create_database(self.postgres_port, password)
        for spec in group:
            for member in self.services[spec.name]:
                if not spec.is_one_shot:
                    member.wait_healthy(HEALTHY_WITHIN_S)

    def _replicas(self, spec: ServiceSpec) -> Sequence[Mapping[str, str]]:
        """Return the settings that each process of a service has for itself."""
        return self._gateways if spec.name == "gateway" and self._gateways else [{}] * spec.replicas

    def _member(self, spec: ServiceSpec, settings: Mapping[str, str]) -> Managed:
        self._made += 1
        name = f"{spec.name}-{self._made}"
        own = self.directory / name
        own.mkdir(mode=0o700)
        places = self._places(spec.name, own)
        argv = [self._moved(part, places) for part in spec.command]
        health = [self._moved(part, places) for part in spec.health]
        environment = self._environment(spec, places) | dict(settings)
        directory, user = ROOT, None
        if spec.name == "postgres":
            directory, user = self._postgres_directory, programs.database_user()
            socket_directory = ["-c", f"unix_socket_directories={directory}"]
            argv += ["-D", str(directory), "-h", "127.0.0.1", "-p", str(self.postgres_port), *socket_directory]
            environment |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.postgres_port)}
        elif spec.name == "redis":
            argv += ["--bind", "127.0.0.1", "--port", str(self.redis_port), "--dir", str(own)]
            health[1:1] = ["-p", str(self.redis_port)]
        return Managed(
            Plan(
                name=name,
                argv=argv,
                environment=environment,
                directory=directory,
                log_path=self.directory / f"{name}.log",
                health=health,
                stop_signal=signal.Signals[spec.stop_signal],
                stop_grace_s=spec.stop_grace_s,
                user=user,
            )
        )

    def _environment(self, spec: ServiceSpec, places: Mapping[str, str]) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ} | dict(self._everywhere)
        interpreter = str(Path(sys.executable).parent)
        environment = kept | {"PATH": os.pathsep.join([interpreter, programs.search_path()])}
        if not spec.is_ours:
            return environment
        said = {name: self._moved(value, places) for name, value in spec.environment.items()}
        here = {"HOST": "127.0.0.1", "PORT": str(free_port())}
        return environment | self.settings | said | here | {"PYTHONUNBUFFERED": "1"}

    def _places(self, service: str, own: Path) -> dict[str, str]:
        """Return what stands where a container has something else."""
        places = {
            "/run/secrets": str(self.secrets),
            "/journal": str(self.journal),
            "/var/lib/proxysite": str(own),
            "/etc/nginx": str(self.directory / "nginx"),
            "/tmp/": f"{self.directory}/tmp/",  # noqa: S108 - a container's own
            "redis:6379": f"127.0.0.1:{self.redis_port}",
            _FRONT_NETWORK: "127.0.0.1",
        }
        if service == "nginx":
            places |= {
                "127.0.0.1:8080": f"127.0.0.1:{self.http_port}",
                "listen 8080": f"listen 127.0.0.1:{self.http_port}",
                "listen 8443": f"listen 127.0.0.1:{self.https_port}",
                "/dev/stdout": str(self.directory / "nginx" / "access.log"),
            }
        return places

    def _moved(self, text: str, places: Mapping[str, str]) -> str:
        pattern = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
        return re.sub(pattern, lambda found: places[found[0]], text)

    # Run

    def _supervise(self) -> None:
        while not self._is_stopping.wait(0.2):
            for member in [member for members in self.services.values() for member in members]:
                if member.is_wanted and not member.is_running:
                    member.start()


def _children(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return set()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--upstream", default="", help="where /v1 goes; without it, the sandbox with a key made now")
    arguments = parser.parse_args()
    key = f"sk-sandbox-{secrets.token_hex(8)}"
    settings = {"SANDBOX_ENABLED": "true", "SANDBOX_KEY": key}
    if arguments.upstream:
        settings = {"UPSTREAM_URL": arguments.upstream}
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    with Topology(settings) as topology:
        for name, members in topology.services.items():
            ports = [member.plan.environment.get("PORT", "") for member in members]
            sys.stdout.write(f"{name:9} {len(members)} {' '.join(ports)}\n")
        sys.stdout.write(topology.one("migrate").log)
        sys.stdout.write(f"\n{topology.url} (certificate: {topology.certificate}); logs in {topology.directory}\n")
        if not arguments.upstream:
            sys.stdout.write(f"key of the sandbox: {key}\n")
        sys.stdout.flush()
        asked.wait()


if __name__ == "__main__":
    main()
