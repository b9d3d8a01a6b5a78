from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy
from proxysite.tests.examination import refuse


@pytest.fixture(scope="module")
def _sound(shared_upstream: FakeUpstream) -> Iterator[LiveProxy]:
    with LiveProxy(
        UPSTREAM_URL=shared_upstream.url, SANDBOX_ENABLED="true", JOURNAL_MAX_BYTES="2000000", CELERY_EMBEDDED="true"
    ) as proxy:
        beat = "SELECT 1 FROM proxysite_taskrun WHERE task = 'proxysite.tasks.heartbeat'"
        proxy.wait_for_rows(f"{beat} AND last_succeeded_at IS NOT NULL", 1, 180)
        yield proxy


@pytest.fixture
def sound(_sound: LiveProxy, upstream: FakeUpstream) -> LiveProxy:
    """A running instance with nothing wrong."""
    upstream.script = refuse
    return _sound
