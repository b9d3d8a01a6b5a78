"""What is done for each connection now and then goes on, whatever one of them comes to."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest
import uvicorn

from gateway.tests.live import PATIENCE_S
from proxysite.http_protocol import HTTPProtocol
from proxysite.server import sweep_connections

BODY_TO_COME = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n"


async def test_a_connection_that_fails_keeps_no_other_from_being_looked_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[str] = []

    def app(scope: dict[str, str], receive: object, send: object) -> None:
        asked.append(scope["type"])
        raise RuntimeError

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=HTTPProtocol, lifespan="off", interface="asgi3", log_config=None)
    config.load()
    config.loaded_app = app  # as the project's own, which is no coroutine function
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    sweeping = asyncio.create_task(sweep_connections(server))
    try:
        for number in (1, 2):  # one after the other: the second finds out whether the first has ended it all
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(BODY_TO_COME)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(reader.readexactly(1), PATIENCE_S)
            writer.close()
            assert len(asked) == number
    finally:
        sweeping.cancel()
        server.should_exit = server.force_exit = True
        await serving
    assert [record.levelno for record in caplog.records if record.name == "proxysite.server"] == [logging.ERROR] * 2
