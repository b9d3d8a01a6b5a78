"""The whole topology, behind its nginx; skipped where the programs of others that it takes are missing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deploy import programs
from deploy import topology as topologies
from deploy.topology import Topology
from gateway.tests.fake_upstream import FakeUpstream, echo
from gateway.tests.live import free_port

# A topology binds its ports up to a minute after it has found them free: none may be one that the system hands out.
topologies.free_port = free_port


def require_programs() -> None:
    """Skip the test where they are missing; in CI, fail: there they are installed."""
    if missing := programs.missing_programs():
        message = f"the topology needs {', '.join(missing)}: {programs.HOW_TO_GET_THEM}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="module")
def topology_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture(scope="module")
def running_topology(topology_upstream: FakeUpstream) -> Iterator[Topology]:
    require_programs()
    settings = {
        "UPSTREAM_URL": topology_upstream.url,
        "HEARTBEAT_SECONDS": "1",
        "DEFAULT_GRANT_USD": "100",
        "SANDBOX_ENABLED": "true",
    }
    with Topology(settings) as topology:
        yield topology


@pytest.fixture
def topology(running_topology: Topology, topology_upstream: FakeUpstream) -> Iterator[Topology]:
    """Two gateways and the rest, whose upstream plays `echo` until the test sets another script."""
    topology_upstream.script = echo
    topology_upstream.requests.clear()
    yield running_topology
    assert not topology_upstream.failures
