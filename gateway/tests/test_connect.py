"""Several addresses of one name: whichever answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from gateway.connect import ATTEMPT_DELAY_S, Address, connect_to_any


@pytest.fixture
def listening() -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield socket.AF_INET, server.getsockname()


@pytest.fixture
def refusing() -> Iterator[Address]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield socket.AF_INET, unused.getsockname()


@pytest.fixture
def silent() -> Iterator[Address]:
    """An address that never answers: its queue of one is full."""
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield socket.AF_INET, server.getsockname()


async def test_the_next_address_is_tried_when_one_refuses(refusing: Address, listening: Address) -> None:
    with await connect_to_any([refusing, listening]) as sock:
        assert sock.getpeername() == listening[1]


async def test_the_next_address_is_tried_when_one_is_silent(silent: Address, listening: Address) -> None:
    start = asyncio.get_running_loop().time()
    with await connect_to_any([silent, listening]) as sock:
        assert sock.getpeername() == listening[1]
    # To wait for the silent one would take minutes.
    assert asyncio.get_running_loop().time() - start < ATTEMPT_DELAY_S + 20


async def test_when_all_refuse_the_error_says_so(refusing: Address) -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect_to_any([refusing, refusing])
