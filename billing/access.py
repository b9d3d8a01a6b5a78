"""From where a key may be used, for what the site itself tells of it: its balance, its use, its conversations."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from django.conf import settings

from billing.limits import Network, read_networks
from billing.models import ApiKey


@dataclass(frozen=True, slots=True)
class Access:
    """What operators have decided of a key; `is_used` is whether the upstream has ever taken it."""

    is_used: bool
    is_blocked: bool
    networks: tuple[Network, ...]

    def allows(self, address: str) -> bool:
        """Return whether the key may be used from an address; one that cannot be read is in no network."""
        if not self.networks:
            return True
        try:
            parsed = ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(parsed, IPv6Address):
            parsed = parsed.ipv4_mapped or parsed
        return any(parsed in network for network in self.networks)


def access_of(fingerprint: str) -> Access:
    """Return what is decided of a key, in one query; of an unknown one what the settings say."""
    row = ApiKey.objects.filter(fingerprint=fingerprint).values_list("blocked", "allowed_networks").first()
    is_blocked, networks = row or (False, "")
    return Access(row is not None, is_blocked, read_networks(networks) or tuple(settings.ALLOWED_NETWORKS))
