"""What is measured: how each proxy is started, and the fake upstream behind all of them."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trustme

from bench.load import Address, LoadError, get
from bench.processes import ProcessError, running

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 60.0
SETUP_TIMEOUT_S = 120.0
RELAY = "relay"  # our own without its accounting
DIRECT = "direct"  # the load against the upstream with nothing between: the ceiling of every figure


@dataclass(frozen=True, slots=True)
class Upstream:
    """The fake upstream's process with its two doors."""

    plain: Address
    tls: Address
    ca_file: Path
    pid: int

    def address(self, kind: str) -> Address:
        return self.tls if kind == "tls" else self.plain


@dataclass(frozen=True, slots=True)
class Launch:
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    before: list[str] | None = None  # run once for each directory, to its end


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes; pid is the root of what is accounted, None for the upstream itself."""

    name: str
    address: Address
    pid: int | None


def find_tool(name: str) -> str | None:
    """Return the path of a Debian tool; /usr/sbin is not on everybody's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def launch_nginx(work_dir: Path, port: int, upstream: Upstream, kind: str) -> Launch:
    nginx = find_tool("nginx")
    if nginx is None:
        raise ProcessError("nginx is not installed")
    config = work_dir / "nginx.conf"
    config.write_text(_nginx_config(work_dir, port, upstream, kind))
    return Launch([nginx, "-p", str(work_dir), "-e", str(work_dir / "error.log"), "-c", str(config)])


def _nginx_config(work_dir: Path, port: int, upstream: Upstream, kind: str) -> str:
    """Return a config with buffering off throughout: the path does not tell a stream from a JSON answer."""
    temp_paths = "\n".join(
        f"    {name}_temp_path {work_dir}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # nginx 1.22 speaks TLS 1.2 at most unless told; the gateway's TLS is 1.3.
    tls = f"""
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_ssl_trusted_certificate {upstream.ca_file};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_session_reuse on;"""
    return f"""
daemon off;
{f"user {getpass.getuser()};" if os.geteuid() == 0 else ""}
worker_processes 1;
worker_rlimit_nofile 20000;
pid {work_dir}/nginx.pid;
events {{ worker_connections 16000; }}
http {{
    access_log off;
{temp_paths}
    client_max_body_size 0;
    keepalive_requests 1000000000;
    upstream fake {{
        server 127.0.0.1:{upstream.address(kind).port};
        keepalive 512;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /healthz {{ return 204; }}
        location / {{
            proxy_pass {"https" if kind == "tls" else "http"}://fake;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 300s;{tls if kind == "tls" else ""}
        }}
    }}
}}
"""


def launch_gateway(
    work_dir: Path, port: int, upstream: Upstream, kind: str, *, transport: str = "own", workers: int = 1
) -> Launch:
    manage = [sys.executable, str(ROOT / "manage.py")]
    env = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "VAR_DIR": str(work_dir),
        "WORKERS": str(workers),
        "UPSTREAM_URL": f"{'https' if kind == 'tls' else 'http'}://127.0.0.1:{upstream.address(kind).port}",
        "UPSTREAM_TRANSPORT": transport,
        # What runs by the clock is no request's cost, and its start would stand in the figures.
        "CELERY_EMBEDDED": "false",
    }
    if kind == "tls":
        env["UPSTREAM_CA_FILE"] = str(upstream.ca_file)
    return Launch([*manage, "serve"], env, before=[*manage, "setup"])


def launch_relay(work_dir: Path, port: int, upstream: Upstream, kind: str) -> Launch:
    """See `bench.relay_alone`."""
    gateway = launch_gateway(work_dir, port, upstream, kind)
    argv = [sys.executable, "-m", "gunicorn", "-c", "python:proxysite.gunicorn_conf", "bench.relay_alone:application"]
    return Launch(argv, gateway.env, before=gateway.before)


Launcher = Callable[[Path, int, Upstream, str], Launch]

LAUNCHERS: dict[str, Launcher] = {
    "nginx": launch_nginx,
    "own": partial(launch_gateway, transport="own"),
    RELAY: launch_relay,
    "httpx": partial(launch_gateway, transport="httpx"),
}


def _base_env() -> dict[str, str]:
    """Return what a process needs to run at all: no setting of the caller's shell may change a figure."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


@contextmanager
def fake_upstream(work_dir: Path, *, cpu: int) -> Iterator[Upstream]:
    """Run the fake upstream, with a CA and a certificate of its own made now."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    ca_file, cert_file, key_file = (work_dir / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca_file))
    key_file.touch(mode=0o600)
    certificate.private_key_pem.write_to_path(str(key_file))
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(str(cert_file), append=True)
    argv = [sys.executable, "-m", "bench.upstream", str(cert_file), str(key_file)]
    log = work_dir / "upstream.log"
    with running(argv, cpu=cpu, log=log, env=_base_env(), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ProcessError(f"the fake upstream did not start:\n{_tail(log)}")
        ports = json.loads(line)
        trust = ssl.create_default_context(cafile=str(ca_file))
        yield Upstream(Address(ports["http"]), Address(ports["tls"], trust), ca_file, process.pid)


@contextmanager
def proxy(
    name: str, work_dir: Path, upstream: Upstream, kind: str, *, cpu: int, launcher: Launcher | None = None
) -> Iterator[Target]:
    """Run one proxy in work_dir before the upstream's `kind` door ("http" or "tls"), ready for requests."""
    first_time = not work_dir.exists()
    work_dir.mkdir(exist_ok=True)
    address = Address(_free_port())
    launch = (launcher or LAUNCHERS[name])(work_dir, address.port, upstream, kind)
    env = _base_env() | launch.env
    log = work_dir / "output.log"
    if launch.before and first_time:
        _run_to_end(launch.before, cpu=cpu, env=env, log=log)
    with running(launch.argv, cpu=cpu, log=log, env=env, cwd=ROOT) as process:
        _wait_until_ready(name, process, address, log)
        yield Target(name, address, process.pid)


def _run_to_end(argv: list[str], *, cpu: int, env: Mapping[str, str], log: Path) -> None:
    with running(argv, cpu=cpu, log=log, env=env, cwd=ROOT) as process:
        try:
            status = process.wait(SETUP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = -1
    if status:
        raise ProcessError(f"{' '.join(argv)} failed:\n{_tail(log)}")


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], address: Address, log: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            get(address, "/healthz")
            return
        except (OSError, LoadError) as exc:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise ProcessError(f"{name} did not get ready ({exc}):\n{_tail(log)}") from exc
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _tail(log: Path, size_bytes: int = 3000) -> str:
    return log.read_bytes()[-size_bytes:].decode(errors="replace") if log.exists() else ""
