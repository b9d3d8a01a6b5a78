"""What is decided of a key holds soon, also while the ledger's own work hangs and nobody announces anything."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.limited import ask, error_of
from gateway.tests.live import LiveProxy, wait_until

API_KEY = "sk-to-be-blocked-00001"
WITHIN_S = 30.0
ON_POSTGRESQL = os.environ.get("DATABASE_URL", "").startswith("postgres")

_BLOCK = "from billing import models, services; services.block_key(models.ApiKey.objects.get())"
_WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{}'::regclass"


@contextlib.contextmanager
def proxy_with_used_key(upstream: FakeUpstream) -> Iterator[LiveProxy]:
    """A proxy of which a key is known, and nobody who would announce what is decided of it."""
    with LiveProxy(
        UPSTREAM_URL=upstream.url, REDIS_URL="", WORKERS="1", JOURNAL_FLUSH_SECONDS="0.1", KEY_MONTHLY_USD="1000"
    ) as proxy:
        assert ask(proxy, API_KEY).status_code == 200
        proxy.wait_for_rows("SELECT id FROM billing_apikey", 1)
        yield proxy


def wait_until_refused(proxy: LiveProxy, timeout_s: float) -> None:
    wait_until(lambda: ask(proxy, API_KEY).status_code == 403, timeout_s)
    assert error_of(ask(proxy, API_KEY))[2] == "key_blocked"


@pytest.mark.skipif(not ON_POSTGRESQL, reason="on SQLite nobody can block a key while somebody else writes")
@pytest.mark.parametrize("table", ["billing_usagerecord", "billing_keyday"])
def test_a_key_is_blocked_while_a_batch_waits_for_a_locked_table(upstream: FakeUpstream, table: str) -> None:
    with proxy_with_used_key(upstream) as proxy, psycopg.connect(proxy.environment["DATABASE_URL"]) as holder:
        holder.execute(SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(Identifier(table)))
        assert ask(proxy, API_KEY).status_code == 200
        wait_until(lambda: proxy.rows(_WAITING.format(table)) != [(0,)])
        clicked_at = time.monotonic()
        proxy.manage("shell", "-v0", "-c", _BLOCK)
        wait_until_refused(proxy, clicked_at + WITHIN_S - time.monotonic())
        holder.rollback()
        proxy.wait_for_rows("SELECT event_id FROM billing_usagerecord WHERE status = 200", 2)


@pytest.mark.skipif(ON_POSTGRESQL, reason="of a file with one writer")
def test_a_blocked_key_is_refused_while_a_batch_waits_for_the_only_writer(upstream: FakeUpstream) -> None:
    with (
        proxy_with_used_key(upstream) as proxy,
        contextlib.closing(sqlite3.connect(proxy.var_dir / "db.sqlite3", isolation_level=None)) as holder,
    ):
        holder.execute("UPDATE billing_apikey SET blocked = 1")
        clicked_at = time.monotonic()
        holder.execute("BEGIN IMMEDIATE")
        ask(proxy, API_KEY)
        wait_until_refused(proxy, clicked_at + WITHIN_S - time.monotonic())
