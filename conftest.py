"""Fixtures of every test: the proxy started by its production command, and a real upstream behind it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before Django reads its settings: tests must not touch a developer's own var/.
os.environ["VAR_DIR"] = tempfile.mkdtemp(prefix="proxysite-tests-")
# Nor one another's keys in a Redis that they share.
os.environ["REDIS_KEY_PREFIX"] = Path(os.environ["VAR_DIR"]).name

from gateway.tests.fake_upstream import FakeUpstream, echo
from gateway.tests.live import LiveProxy, remove_instance_set_up

pytest_plugins = ["proxysite.tests.browser"]

# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Begun first, the longest before all, so that none of them is the last that all wait for: `-n` with
# `--no-loadscope-reorder` keeps the order.
_LONGEST = (
    "deploy/tests/test_chaos.py",
    "deploy/tests/test_backup.py",
    "gateway/tests/test_crash.py",
    "gateway/tests/test_exact.py",
    "proxysite/tests/test_doctor_address.py",
    "proxysite/tests/test_celery.py",
    "proxysite/tests/test_pages_browser.py",
    "proxysite/tests/test_doctor.py",
    "deploy/tests/test_topology.py",
    "deploy/tests/test_upgrade.py",
    "gateway/tests/test_limits_away.py",
    "gateway/tests/test_abuse.py",
    "gateway/tests/test_last_cent.py",
    "proxysite/tests/test_examples.py",
    "proxysite/tests/test_limiting.py",
)
_ORDER = {name: place for place, name in enumerate(_LONGEST)}
_DAY_S = 24 * 3600
_LAST_OF_A_DAY_S = 90


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _ORDER.get(item.nodeid.partition("::")[0], len(_ORDER)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let a day that is about to end do so: what a test has recorded today must be of today when it looks."""
    left_s = _DAY_S - time.time() % _DAY_S
    if left_s < _LAST_OF_A_DAY_S:
        time.sleep(left_s + 0.1)


def pytest_xdist_auto_num_workers() -> int:
    """Three processes for two CPUs: a part of the time tests wait for other processes."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Leave nothing behind; the processes that `-n` starts run no exit handlers."""
    remove_instance_set_up()
    shutil.rmtree(os.environ["VAR_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture(scope="session")
def _own_proxy(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(UPSTREAM_URL=shared_upstream.url, SANDBOX_ENABLED="true") as proxy:
        yield proxy


@pytest.fixture(scope="session")
def _httpx_proxy(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(UPSTREAM_URL=shared_upstream.url, UPSTREAM_TRANSPORT="httpx") as proxy:
        yield proxy


@pytest.fixture
def upstream(shared_upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    """The upstream behind `proxy`, playing `echo` until the test sets another script."""
    shared_upstream.script = echo
    shared_upstream.requests.clear()
    shared_upstream.failures.clear()
    shared_upstream.signals.queue.clear()
    yield shared_upstream
    assert not shared_upstream.failures


@pytest.fixture
def own_proxy(_own_proxy: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    """A running proxy with default settings, the sandbox on, whose upstream is `upstream`."""
    return _own_proxy


@pytest.fixture(params=["own", "httpx"])
def proxy(request: pytest.FixtureRequest, upstream: FakeUpstream) -> LiveProxy:
    """A running proxy whose upstream is `upstream`; the test runs once with either transport."""
    running: LiveProxy = request.getfixturevalue(f"_{request.param}_proxy")
    return running
