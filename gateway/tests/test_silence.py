"""An upstream that takes nothing of a body is silent inside it: the limit of silence holds, not the first byte's."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from gateway.tests.live import PATIENCE_S, LiveProxy
from gateway.tests.raw_client import RawClient

MIB = 1 << 20


@contextlib.contextmanager
def upstream_that_reads_nothing() -> Iterator[str]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("transport", ["own", "httpx"])
@pytest.mark.parametrize(
    ("target", "length"), [("/v1/files", 64 * MIB), ("/v1/chat/completions", 12 * MIB)], ids=["as it comes", "whole"]
)
def test_an_upload_that_the_upstream_does_not_take_is_given_up(target: str, length: int, transport: str) -> None:
    if transport == "httpx" and length < 64 * MIB:
        pytest.skip("httpx writes a whole body at once and does not say how much was taken")
    with (
        upstream_that_reads_nothing() as url,
        LiveProxy(
            UPSTREAM_URL=url,
            SILENCE_TIMEOUT_SECONDS="1",
            FIRST_BYTE_TIMEOUT_SECONDS=str(10 * PATIENCE_S),
            UPSTREAM_TRANSPORT=transport,
        ) as proxy,
        RawClient(proxy) as client,
    ):
        client.send(f"POST {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError, TimeoutError):
            client.socket.settimeout(5)
            for _ in range(length // MIB):
                client.send(b" " * MIB)
        client.socket.settimeout(PATIENCE_S)
        answer = client.answer()
    assert answer.status == 504
    assert json.loads(answer.body)["error"]["code"] == "upstream_timeout"
