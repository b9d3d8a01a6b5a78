"""A real nginx in front of a proxy under test."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import trustme

from gateway.tests.live import free_port

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
_PATHS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class Nginx:
    """`with Nginx(proxy_port, location) as front:` serves on `front.url`, over TLS if there is an authority."""

    def __init__(self, port_behind: int, location: str, *, authority: trustme.CA | None = None, http2: bool = False):
        self.port = free_port()
        self.url = f"{'https' if authority else 'http'}://127.0.0.1:{self.port}"
        self._dir = Path(tempfile.mkdtemp(prefix="proxysite-nginx-"))
        tls = ""
        if authority:
            certificate = authority.issue_cert("127.0.0.1")
            certificate.private_key_and_cert_chain_pem.write_to_path(str(self._dir / "cert.pem"))
            tls = f"ssl_certificate {self._dir}/cert.pem; ssl_certificate_key {self._dir}/cert.pem;"
        listen = f"127.0.0.1:{self.port}{' ssl' if authority else ''}{' http2' if http2 else ''}"
        temp_paths = " ".join(f"{name}_temp_path {self._dir}/{name};" for name in _PATHS)
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        (self._dir / "nginx.conf").write_text(
            f"""
            daemon off; {user} worker_processes 1; pid {self._dir}/nginx.pid;
            events {{ worker_connections 256; }}
            http {{
                access_log off; {temp_paths}
                map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
                server {{
                    listen {listen}; {tls}
                    location / {{ proxy_pass http://127.0.0.1:{port_behind}; {location} }}
                    location = /metrics {{
                        proxy_set_header X-Forwarded-For $remote_addr;
                        proxy_pass http://127.0.0.1:{port_behind};
                    }}
                }}
            }}
            """
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nginx:
        assert NGINX is not None
        error_log = self._dir / "error.log"
        command = [NGINX, "-p", str(self._dir), "-e", str(error_log), "-c", str(self._dir / "nginx.conf")]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not (self._dir / "nginx.pid").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nginx did not start: {error_log.read_text()}")
            time.sleep(0.02)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
        shutil.rmtree(self._dir, ignore_errors=True)
