"""The Redis that tests share where one answers, and one that nobody else uses."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gateway.tests.live import PATIENCE_S, free_port

REDIS_URL = os.environ.get("REDIS_URL") or "redis://127.0.0.1:6379/9"


def redis_answers() -> bool:
    try:
        with redis.Redis.from_url(REDIS_URL, socket_connect_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


needs_redis = pytest.mark.skipif(not os.environ.get("CI") and not redis_answers(), reason="no Redis answers")


@contextlib.contextmanager
def running_redis(directory: Path, port: int = 0) -> Iterator[str]:
    """Start one and return its address; it keeps nothing. Without redis-server the test is skipped."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = port or free_port()
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_until_it_answers(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()


def _wait_until_it_answers(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with redis.Redis(port=port) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
