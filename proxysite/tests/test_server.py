"""How the process starts, stops and restarts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2 as httpx
import pytest

from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate, answer_at_once
from gateway.tests.live import PATIENCE_S, ROOT, LiveProxy, new_client, wait_until
from gateway.tests.raw_client import RawClient


def streaming_script(first_seen: Gate, go_on: Gate) -> object:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events({"number": 1}, done=False)
        first_seen.open()
        await go_on.wait(300)
        await exchange.events({"number": 2})
        await exchange.end_stream()

    return script


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_running_stream_may_finish_when_the_process_is_told_to_stop(
    upstream: FakeUpstream, sig: signal.Signals
) -> None:
    first_seen, go_on = Gate(), Gate()
    upstream.script = streaming_script(first_seen, go_on)  # type: ignore[assignment]
    with LiveProxy(UPSTREAM_URL=upstream.url) as proxy:
        with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions") as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == b'data: {"number": 1}\n\n'
            assert proxy.process is not None
            proxy.process.send_signal(sig)
            wait_until(lambda: refuses_connections(proxy.port))
            go_on.open()
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
        assert proxy.process.wait(PATIENCE_S) == 0


def test_a_stream_that_does_not_finish_in_time_ends_visibly_cut(upstream: FakeUpstream) -> None:
    first_seen, go_on = Gate(), Gate()
    upstream.script = streaming_script(first_seen, go_on)  # type: ignore[assignment]
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="1") as proxy, RawClient(proxy) as client:
        client.request("POST", "/v1/chat/completions", body=b"{}")
        assert first_seen.wait_in_thread()
        client.read_until(b"\n\n")
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        rest = client.read_to_end()
        stopping.join()
    assert b'"code": "gateway_restarting"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    go_on.open()


@pytest.mark.parametrize("is_connected", [True, False])
def test_a_request_that_still_waits_when_the_process_stops_is_told_so_and_recorded(
    upstream: FakeUpstream, is_connected: bool
) -> None:
    asked, go_on = Gate(), Gate()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        asked.open()
        await go_on.wait()

    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="1") as proxy:
        if is_connected:
            assert proxy.get("/v1/models").status_code == 200
        upstream.script = script
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", body=b"{}")
            assert asked.wait_in_thread()
            stopping = threading.Thread(target=proxy.stop)
            stopping.start()
            answer = client.answer()
            stopping.join()
        go_on.open()
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "gateway_restarting")
        proxy.start()
        found = "SELECT status, outcome FROM billing_usagerecord ORDER BY started_at"
        records = proxy.wait_for_rows(found, 1 + is_connected)
        assert records[-1] == (503, "timeout")


def test_a_reload_drops_nothing(upstream: FakeUpstream) -> None:
    stop = threading.Event()
    statuses: list[int] = []
    failures: list[Exception] = []

    def keep_asking(url: str) -> None:
        with new_client() as client:
            while not stop.is_set():
                try:
                    statuses.append(client.post(f"{url}/v1/chat/completions", json={}).status_code)
                except httpx.HTTPError as exc:
                    failures.append(exc)

    first_seen, go_on = Gate(), Gate()
    # Longer than a busy machine may take to start the new worker.
    with LiveProxy(UPSTREAM_URL=upstream.url, GRACEFUL_TIMEOUT_SECONDS="300") as proxy:
        upstream.script = streaming_script(first_seen, go_on)  # type: ignore[assignment]
        with new_client() as http, http.stream("POST", f"{proxy.url}/v1/chat/completions", timeout=300) as stream:
            chunks = stream.iter_raw()
            next(chunks)
            upstream.script = answer_at_once
            old = proxy.worker_pids
            threads = [threading.Thread(target=keep_asking, args=(proxy.url,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(statuses) > 50)
            assert proxy.process is not None
            proxy.process.send_signal(signal.SIGHUP)
            wait_until(lambda: set(proxy.worker_pids) - set(old))
            asked_before = len(statuses)
            wait_until(lambda: len(statuses) > asked_before + 200)
            go_on.open()
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
            wait_until(lambda: not set(proxy.worker_pids) & set(old))
            asked_before = len(statuses)
            wait_until(lambda: len(statuses) > asked_before + 50)
            stop.set()
            for thread in threads:
                thread.join()
    assert not failures
    assert set(statuses) == {200}


def test_a_fresh_start_makes_secrets_that_only_the_owner_reads(own_proxy: LiveProxy) -> None:
    for name in ("secret_key", "key_pepper"):
        path = own_proxy.var_dir / name
        assert path.stat().st_mode & 0o777 == 0o600
        assert len(path.read_text()) >= 32
    assert own_proxy.var_dir.stat().st_mode & 0o077 == 0


def test_the_first_operators_password_is_printed_once(own_proxy: LiveProxy) -> None:
    assert "First operator: admin / " in own_proxy.setup_output
    assert own_proxy.manage("setup") == ""
    assert own_proxy.setup_output.split(" / ")[1].split()[0] not in own_proxy.log


@pytest.mark.parametrize("has_sandbox", [True, False])
def test_the_line_that_is_printed_works_at_once(upstream: FakeUpstream, has_sandbox: bool) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, SANDBOX_ENABLED=str(has_sandbox)) as proxy:
        proxy.stop()
        environment = proxy.environment | {"OPENAI_API_KEY": "sk-of-the-shell"}
        serve = [sys.executable, "manage.py", "serve"]
        with subprocess.Popen(serve, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as serving:
            assert serving.stdout is not None
            line = next(line for line in serving.stdout if b"curl -N" in line)
            answer = subprocess.run(line, shell=True, env=environment, capture_output=True, timeout=240)
            serving.terminate()
    assert answer.returncode == 0
    if has_sandbox:
        assert answer.stdout.endswith(b"data: [DONE]\n\n")
        assert not upstream.requests
    else:
        assert "Bearer sk-of-the-shell" in [value for _, value in upstream.requests[0].headers]


def test_instances_run_side_by_side(own_proxy: LiveProxy, upstream: FakeUpstream, tmp_path: Path) -> None:
    with LiveProxy(UPSTREAM_URL=upstream.url, var_dir=tmp_path, WORKERS="2") as second:
        assert len(second.worker_pids) == 2
        assert second.get("/v1/models").status_code == 200
        assert own_proxy.get("/v1/models").status_code == 200
    assert (tmp_path / "secret_key").read_text() != (own_proxy.var_dir / "secret_key").read_text()


def test_a_wrong_setting_stops_the_start_and_is_named(tmp_path: Path) -> None:
    for name, value in [("PORT", "99999"), ("WORKERS", "many"), ("UPSTREAM_URL", "ftp://x"), ("DEBUG", "maybe")]:
        with pytest.raises(RuntimeError, match=name), LiveProxy(var_dir=tmp_path, **{name: value}):
            pass


def test_the_file_descriptor_limit_is_raised(own_proxy: LiveProxy) -> None:
    limits = Path(f"/proc/{own_proxy.worker_pids[0]}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
    assert soft == hard
    assert os.getpid() not in own_proxy.worker_pids
