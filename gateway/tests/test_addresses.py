"""Whose address a request comes from, and as which it counts."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from gateway.addresses import ProxyTrust
from gateway.limits import counted_address


def scope(client: str | None, *forwarded: str) -> dict[str, object]:
    headers = [(b"x-forwarded-for", said.encode()) for said in forwarded]
    return {"client": (client, 1234) if client else None, "headers": headers}


@pytest.mark.parametrize(
    ("client", "forwarded", "found"),
    [
        ("198.51.100.1", (), "198.51.100.1"),
        ("198.51.100.1", ("203.0.113.9",), "198.51.100.1"),  # nobody trusts it
        ("127.0.0.1", ("203.0.113.9",), "203.0.113.9"),
        ("127.0.0.1", ("6.6.6.6, 203.0.113.9",), "203.0.113.9"),  # what stands before is the client's own word
        ("127.0.0.1", ("6.6.6.6", "203.0.113.9, 10.1.1.1"), "203.0.113.9"),
        ("127.0.0.1", ("203.0.113.9:4711",), "203.0.113.9"),
        ("127.0.0.1", ("[2001:db8::5]:4711",), "2001:db8::5"),
        ("127.0.0.1", ("::ffff:203.0.113.9",), "203.0.113.9"),
        ("127.0.0.1", ("203.0.113.9, nonsense",), "127.0.0.1"),
        ("127.0.0.1", ("",), "127.0.0.1"),
        ("127.0.0.1", ("10.0.0.5",), "10.0.0.5"),
        ("not an address", (), None),
        (None, ("203.0.113.9",), None),
    ],
)
def test_only_trusted_proxies_are_believed(client: str | None, forwarded: tuple[str, ...], found: str | None) -> None:
    trust = ProxyTrust(["127.0.0.1", "::1", "10.0.0.0/8"])
    address = trust.client_of(scope(client, *forwarded))
    assert (None if address is None else str(address)) == found


def test_ipv6_counts_by_its_network() -> None:
    assert counted_address(ip_address("2001:db8:1:2:3::4")) == counted_address(ip_address("2001:db8:1:2:ffff::"))
    assert counted_address(ip_address("2001:db8:1:3::")) != counted_address(ip_address("2001:db8:1:2::"))
    assert counted_address(ip_address("192.0.2.1")) == "192.0.2.1"
