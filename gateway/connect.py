"""From (host, port) to a connected, non-blocking socket: directly or through an egress proxy; and TLS trust.

Errors are httpx's: `ConnectError`, `ProxyError`. Time limits are the caller's, who cancels.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import socket
import ssl
from asyncio import staggered

import httpx2 as httpx
import python_socks
from python_socks.async_.asyncio import Proxy

# RFC 8305 §8: how long one address may be silent before the next is tried beside it.
ATTEMPT_DELAY_S = 0.25
# Longer than any time limit that a caller sets; python-socks would otherwise end after 60 s.
PROXY_LIMIT_S = 3600.0

Address = tuple[int, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]


def tls_context(*, extra_ca_file: str | None) -> ssl.SSLContext:
    """Return a verifying client context: the system's roots, plus those in a PEM file; ALPN http/1.1.

    The upstream may not renegotiate (TLS 1.2): `gateway.tls` writes whenever it likes.

    Errors: OSError or ssl.SSLError when the file is not there or holds no certificate.
    """
    context = ssl.create_default_context()
    if extra_ca_file is not None:
        context.load_verify_locations(cafile=extra_ca_file)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


async def open_socket(host: str, port: int, *, proxy_url: str | None) -> socket.socket:
    """Return a socket connected to the host, Nagle off and TCP keep-alive on; closed again if cancelled."""
    if proxy_url is not None:
        sock = await _open_through_proxy(host, port, proxy_url)
    else:
        try:
            sock = await _open_directly(host, port)
        except (OSError, UnicodeError) as exc:
            raise httpx.ConnectError(f"cannot connect to {host}:{port}: {exc}") from exc
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


async def _open_through_proxy(host: str, port: int, proxy_url: str) -> socket.socket:
    # The proxy resolves the name, with socks5:// as with socks5h://: so does httpx, and where the upstream
    # is blocked its name often resolves wrongly too.
    url = "socks5://" + proxy_url[10:] if proxy_url.lower().startswith("socks5h://") else proxy_url
    try:
        proxy = Proxy.from_url(url, rdns=True)
        connected: socket.socket = await proxy.connect(host, port, timeout=PROXY_LIMIT_S)
    except python_socks.ProxyConnectionError as exc:
        raise httpx.ConnectError(str(exc)) from exc
    except (python_socks.ProxyError, ValueError) as exc:
        raise httpx.ProxyError(str(exc)) from exc
    except OSError as exc:
        raise httpx.ProxyError(f"the egress proxy broke off: {exc}") from exc
    return connected


async def _open_directly(host: str, port: int) -> socket.socket:
    addresses = await _addresses_of(host, port)
    return await (_connect_to(addresses[0]) if len(addresses) == 1 else connect_to_any(addresses))


async def connect_to_any(addresses: list[Address]) -> socket.socket:
    """Return a socket to whichever answers first, each given a head start over the next (RFC 8305).

    Errors: OSError, the first one met, when none answers.
    """
    attempts = [functools.partial(_connect_to, address) for address in addresses]
    # Not create_connection(happy_eyeballs_delay=...): uvloop has no such argument.
    sock: socket.socket | None
    sock, _, errors = await staggered.staggered_race(attempts, delay=ATTEMPT_DELAY_S)
    if sock is None:
        raise next(error for error in errors if error is not None)
    return sock


async def _addresses_of(host: str, port: int) -> list[Address]:
    """Resolve, and let the address families take turns (RFC 8305 §4), beginning with the system's favourite."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not found:
        raise OSError(f"no address for {host}")
    first_family = found[0][0]
    ours = [(family, address) for family, _, _, _, address in found if family == first_family]
    others = [(family, address) for family, _, _, _, address in found if family != first_family]
    turns = itertools.chain.from_iterable(itertools.zip_longest(ours, others))
    return [turn for turn in turns if turn is not None]


async def _connect_to(address: Address) -> socket.socket:
    family, sockaddr = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock
