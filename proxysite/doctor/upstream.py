"""Whether the upstream can be reached, step by step, by a question that costs nothing; and what its clock says."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx2 as httpx
from django.conf import settings

from gateway.connect import open_socket
from gateway.transport import tls_context
from proxysite.doctor.findings import Check, Finding, error, ok, warning

_PATIENCE_S = 15.0
_CLOCK_WARN_S, _CLOCK_ERROR_S = 10, 120


def upstream_checks() -> list[tuple[str, Check]]:
    return [("upstream", _upstream)]


def _upstream() -> Iterator[Finding]:
    """Name, connection, TLS, answer: the first that fails ends it."""
    url = urlsplit(settings.UPSTREAM_URL)
    host, port = str(url.hostname), url.port or (443 if url.scheme == "https" else 80)
    yield (found := _resolved(host))
    if found.level != "ok":
        return
    started = time.perf_counter()
    sock = _connected(host, port)
    if isinstance(sock, Finding):
        yield sock
        return
    way = f"through {_without_login(settings.UPSTREAM_PROXY)}" if settings.UPSTREAM_PROXY else "directly"
    yield ok("upstream", f"{host}:{port} connected {way} in {(time.perf_counter() - started) * 1000:.0f} ms")
    with sock:
        secured = _secured(sock, host) if url.scheme == "https" else sock
        if isinstance(secured, Finding):
            yield secured
            return
        with secured:
            if isinstance(secured, ssl.SSLSocket):
                yield ok("upstream", f"{secured.version()} with a certificate that is trusted")
            yield from _asked(secured, host, port, f"{url.path}/v1/models")


def _resolved(host: str) -> Finding:
    """Look up the name that this machine has to know: behind an egress proxy, the proxy's."""
    proxy = urlsplit(settings.UPSTREAM_PROXY)
    asked, name = (str(proxy.hostname), "UPSTREAM_PROXY") if settings.UPSTREAM_PROXY else (host, "UPSTREAM_URL")
    try:
        found = socket.getaddrinfo(asked, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        cure = f"Look at the name in {name}, and at this machine's DNS (/etc/resolv.conf)."
        return error("upstream", f"{asked} has no address: {exc}", cure)
    addresses = sorted({str(address[4][0]) for address in found})
    return ok("upstream", f"{asked} is {', '.join(addresses[:3])}")


def _connected(host: str, port: int) -> socket.socket | Finding:
    proxy_url = settings.UPSTREAM_PROXY or None

    async def connect() -> socket.socket:
        async with asyncio.timeout(settings.CONNECT_TIMEOUT_SECONDS):
            return await open_socket(host, port, proxy_url=proxy_url)

    try:
        sock = asyncio.run(connect())
    except httpx.ProxyError as exc:
        cure = "Look at the user, password and rules of UPSTREAM_PROXY: it answers, and lets this through not."
        return error("upstream", f"the egress proxy refuses {host}:{port}: {exc}", cure)
    except (httpx.ConnectError, TimeoutError) as exc:
        said = "no answer in time" if isinstance(exc, TimeoutError) else str(exc)
        if proxy_url:
            cure = "Look at UPSTREAM_PROXY: whether it runs, and whether this machine may reach it."
            return error("upstream", f"the egress proxy cannot be reached: {said}", cure)
        cure = "Open the way out in the firewall, or set UPSTREAM_PROXY to a proxy that has one."
        return error("upstream", f"{host}:{port} cannot be connected to: {said}", cure)
    sock.setblocking(True)
    sock.settimeout(_PATIENCE_S)
    return sock


def _secured(sock: socket.socket, host: str) -> ssl.SSLSocket | Finding:
    context = tls_context(extra_ca_file=settings.UPSTREAM_CA_FILE or None)
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as exc:
        cure = (
            "If a proxy of your own opens TLS on the way, name its CA in UPSTREAM_CA_FILE. If not, somebody is in\n"
            "between. An outdated list of roots is Debian's package ca-certificates."
        )
        return error("upstream", f"its certificate is not trusted: {exc.verify_message}", cure)
    except (ssl.SSLError, OSError) as exc:
        cure = "Something on the way cuts TLS: a firewall by name, or a server that speaks none at this port."
        return error("upstream", f"no TLS with {host}: {exc}", cure)


def _asked(sock: socket.socket, host: str, port: int, path: str) -> Iterator[Finding]:
    """Ask for the list of models without a key: an answer that is refused is an answer."""
    connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE_S)
    connection.sock = sock
    started = time.perf_counter()
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read(65536)
    except (OSError, http.client.HTTPException) as exc:
        cure = "Is what stands in UPSTREAM_URL an HTTP server, and its scheme right?"
        yield error("upstream", f"no HTTP answer: {type(exc).__name__}", cure)
        return
    now = time.time()
    ms = (time.perf_counter() - started) * 1000
    yield _judged(answer.status, f"answers a question without a key with {answer.status} in {ms:.0f} ms")
    yield from _clock(answer.headers.get("date"), now)


def _judged(status: int, said: str) -> Finding:
    if status == 403:
        cure = "OpenAI refuses some countries and networks: set UPSTREAM_PROXY to a proxy in a supported one."
        return warning("upstream", said, cure)
    if status < 300:
        cure = (
            "If that upstream asks nobody for a key, whoever reaches this gateway uses it, and each key that is made\n"
            "up becomes a row of the ledger: let only known users in, by the network or by what stands in front."
        )
        return warning("upstream", said, cure)
    if status == 404:
        return warning("upstream", said, "Look at the path in UPSTREAM_URL: /v1 is put behind it.")
    if status >= 500:
        return warning("upstream", said, "The upstream itself is in trouble: see its status page.")
    return ok("upstream", said)


def _clock(date: str | None, now: float) -> Iterator[Finding]:
    try:
        offset_s = now - parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        yield ok("clock", "not compared: the upstream tells no date")
        return
    if abs(offset_s) < _CLOCK_WARN_S:
        yield ok("clock", "agrees with the upstream's")
        return
    make = error if abs(offset_s) >= _CLOCK_ERROR_S else warning
    said = f"{abs(offset_s):.0f} s {'ahead of' if offset_s > 0 else 'behind'} the upstream's"
    yield make("clock", said, "Let chrony or systemd-timesyncd set this machine's clock: days and grants go by it.")


def _without_login(url: str) -> str:
    return urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()
