"""Clients that ask for much and read little of it: whoever else asks has a connection to the database all the same."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client

from gateway.tests.live import LiveProxy

API_KEY = "sk-asks-for-much-0001"
CONNECTIONS = 8  # the pool's
# So much that a row more has been read for it than for its head; no more than a kernel keeps without its reader.
READ_BYTES = 100_000

_MUCH_USED = """
import datetime as dt
from django.conf import settings
from django.contrib.auth.models import User
from django.test import Client
from billing import keys, models, services
raw = {api_key!r}.encode()
fingerprint = keys.fingerprint(raw, pepper=settings.KEY_PEPPER.encode())
key = services.ensure_key(fingerprint=fingerprint, hint=keys.hint(raw))
today = dt.datetime.now(dt.UTC).date()
models.UsageDay.objects.bulk_create(
    (
        models.UsageDay(key=key, day=today - dt.timedelta(days=n % 80), model=f"{{n:0128}}", endpoint=f"/{{n:095}}")
        for n in range(40_000)
    ),
    batch_size=2000,
)
operator = Client()
operator.force_login(User.objects.create_superuser("operator", password="-"))
print(operator.cookies["sessionid"].value)
"""


@pytest.fixture(scope="module")
def much_used() -> Iterator[tuple[LiveProxy, str]]:
    """A proxy one of whose keys has used much, and the cookie of an operator."""
    with LiveProxy(WORKERS="1", REDIS_URL="") as proxy:
        session = proxy.manage("shell", "-v0", "-c", _MUCH_USED.format(api_key=API_KEY)).strip()
        yield proxy, session


@pytest.mark.skipif(
    not os.environ.get("DATABASE_URL", "").startswith("postgres"), reason="a file has no pool of connections"
)
@pytest.mark.parametrize("target", ["/pro/usage", "/pro/usage?format=csv", "/admin/billing/usageday/export/"])
def test_clients_that_do_not_read_hold_no_connection(much_used: tuple[LiveProxy, str], target: str) -> None:
    proxy, session = much_used
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            unread = stack.enter_context(socket.socket())
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.settimeout(60)
            unread.connect(("127.0.0.1", proxy.port))
            unread.sendall(
                f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
                f"Cookie: sessionid={session}\r\n\r\n".encode()
            )
            read = unread.recv(4096)
            assert read.startswith(b"HTTP/1.1 200")
            while len(read) < READ_BYTES:
                read += unread.recv(4096)
        for _ in range(5):
            assert proxy.get("/pro/balance", headers={"Authorization": f"Bearer {API_KEY}"}).status_code == 200
        assert proxy.get("/readyz").status_code == 200


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("target", ["/pro/usage", "/admin/", "/admin/billing/grant/", "/docs/", "/nowhere"])
def test_no_page_keeps_its_connection_until_it_is_read(client: Client, target: str) -> None:
    client.force_login(User.objects.create_superuser("operator", password="-"))
    client.get(target, headers={"Authorization": f"Bearer {API_KEY}"})
    assert connection.connection is None
