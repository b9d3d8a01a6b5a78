"""Where a request comes from: the connection's other end, or whom trusted proxies name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any

from gateway.headers import RawHeaders
from gateway.limits import Address, Network


class ProxyTrust:
    """Whose `X-Forwarded-For` is believed: addresses and networks, or `*` for everybody's."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self._trusts_all = "*" in trusted
        self._networks: list[Network] = []
        for word in trusted:
            try:
                self._networks.append(ip_network(word, strict=False))
            except ValueError:
                continue  # a name, such as a socket's path: nobody's address

    def client_of(self, scope: Any) -> Address | None:
        """Return the address of whoever sent a request, None if nobody knows it.

        Each proxy adds whom it saw at the end, so that the field is read from there, and only as far as those who
        say so are trusted: what stands before that is anybody's word.
        """
        client = scope.get("client")
        address = _address(client[0]) if client else None
        if not self._trusts(address):
            return address
        for said in reversed(_forwarded_for(scope["headers"])):
            named = _address(said)
            if named is None:
                return address
            address = named
            if not self._trusts(address):
                return address
        return address

    def _trusts(self, address: Address | None) -> bool:
        if self._trusts_all:
            return True
        return address is not None and any(address in network for network in self._networks)


def _forwarded_for(headers: RawHeaders) -> list[str]:
    said = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    return [part.strip() for part in said.decode("latin-1").split(",")] if said else []


def _address(text: str) -> Address | None:
    """Return an address as proxies write it: perhaps with a port, IPv6 then in brackets."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
