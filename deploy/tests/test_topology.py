"""What docker-compose.yml starts, as its clients see it: nginx, two gateways, web, worker, beat, PostgreSQL, Redis."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import psycopg
import pytest
from websockets.sync.client import connect

from deploy.tests.traffic import (
    MESSAGES,
    MODEL,
    PATIENCE_S,
    USD_EACH,
    Numbered,
    new_client,
    new_sdk,
    trust,
    wait_until,
)
from deploy.topology import Topology
from gateway.tests.fake_upstream import Exchange, FakeUpstream, Gate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_openais_sdk_streams_and_does_not_stream(topology: Topology, topology_upstream: FakeUpstream) -> None:
    topology_upstream.script = Numbered()
    sdk = new_sdk(topology, "sk-topology-sdk")
    whole = sdk.chat.completions.create(model=MODEL, messages=MESSAGES)  # type: ignore[call-overload]
    stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == "Hello"
    assert "".join(chunk.choices[0].delta.content for chunk in stream) == "HelloHello"


def test_an_event_arrives_while_the_upstream_still_waits(topology: Topology, topology_upstream: FakeUpstream) -> None:
    gate = Gate()
    topology_upstream.script = Numbered(gate)
    stream = new_sdk(topology, "sk-topology-sse").chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=MESSAGES, stream=True
    )
    events = iter(stream)
    assert next(events).choices[0].delta.content == "Hello"
    assert not gate.is_open()
    gate.open()
    assert len(list(events)) == 1


def test_a_100_mb_upload_goes_up_as_it_comes(topology: Topology, topology_upstream: FakeUpstream) -> None:
    size, part = 100 << 20, bytes(1 << 20)
    first_part_seen = Gate()

    async def script(exchange: Exchange) -> None:
        received = 0
        while piece := await exchange.read_some_body():
            received += len(piece)
            exchange.request.body.clear()
            if received >= len(part) // 2:
                first_part_seen.open()
        await exchange.answer(json.dumps({"received": received}).encode())

    def body() -> Iterator[bytes]:
        yield part
        assert first_part_seen.wait_in_thread(PATIENCE_S)
        for _ in range(size // len(part) - 1):
            yield part

    topology_upstream.script = script
    headers = {"content-length": str(size), "authorization": "Bearer sk-topology-upload"}
    with new_client(topology) as client:
        answer = client.post("/v1/files", content=body(), headers=headers)
    assert answer.json() == {"received": size}


def test_websocket_passes(topology: Topology) -> None:
    address = topology.url.replace("https", "wss") + "/v1/realtime?model=gpt-realtime"
    headers = {"Authorization": "Bearer sk-sandbox"}
    with connect(address, ssl=trust(topology), additional_headers=headers, proxy=None) as websocket:
        assert json.loads(websocket.recv(timeout=PATIENCE_S))["type"] == "session.created"


def test_the_balance_counts_what_all_gateways_did(topology: Topology, topology_upstream: FakeUpstream) -> None:
    topology_upstream.script = Numbered()
    requests = 8
    key = {"authorization": "Bearer sk-topology-balance"}
    with new_client(topology) as client:

        def balance_now() -> dict[str, float]:
            answer = client.get("/pro/balance", headers=key)
            return answer.json()["data"] if answer.status_code == 200 else {"used": 0.0}

        for number in range(requests):
            body = {"model": MODEL, "messages": MESSAGES, "stream": bool(number % 2)}
            assert client.post("/v1/chat/completions", json=body, headers=key).status_code == 200
        wait_until(lambda: balance_now()["used"] >= requests * USD_EACH, "all requests in the ledger")
        balance = balance_now()
    assert balance == {"total": 100.0, "used": requests * USD_EACH, "balance": 100 - requests * USD_EACH}
    log = (topology.directory / "nginx" / "access.log").read_text()
    asked = set(re.findall(r'POST /v1/chat/completions 200 .*"127\.0\.0\.1:(\d+)"', log))
    assert asked == {gateway.plan.environment["PORT"] for gateway in topology.services["gateway"]}


def test_an_operator_logs_in(topology: Topology) -> None:
    found = re.search(r"First operator: (\S+) / (\S+)", topology.one("migrate").log)
    assert found
    with new_client(topology, follow_redirects=True) as client:
        page = client.get("/admin/login/")
        assert page.status_code == 200
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page.text)
        assert token
        fields = {"username": found[1], "password": found[2], "csrfmiddlewaretoken": token[1], "next": "/admin/"}
        headers = {"Referer": f"{topology.url}/admin/login/", "Origin": topology.url}
        answer = client.post("/admin/login/", data=fields, headers=headers)
        assert (answer.status_code, urlsplit(str(answer.url)).path) == (200, "/admin/")
        assert all(cookie.secure for cookie in client.cookies.jar)


def test_a_clients_claims_about_its_address_are_not_believed(topology: Topology) -> None:
    def ask(client: httpx.Client, claimed: str) -> int:
        headers = {"authorization": "Bearer sk-nobody-knows", "x-forwarded-for": claimed, "x-real-ip": claimed}
        return client.get("/pro/balance", headers=headers).status_code

    def client_at(address: str) -> httpx.Client:
        transport = httpx.HTTPTransport(verify=trust(topology), local_address=address)
        return httpx.Client(base_url=topology.url, transport=transport, timeout=PATIENCE_S)

    with client_at("127.0.0.2") as first, client_at("127.0.0.3") as second:
        # Sixty in a minute, however slow the machine.
        assert any(ask(first, f"10.0.{number // 250}.{number % 250}") == 429 for number in range(600))
        # Its neighbour has a limit of its own: nginx's word on the address is believed.
        assert ask(second, "10.1.1.1") != 429


def test_plain_http_is_sent_to_https_and_metrics_stay_inside(topology: Topology) -> None:
    with new_client(topology) as client:
        moved = client.get(f"http://127.0.0.1:{topology.http_port}/v1/models?limit=1")
        assert moved.status_code == 308
        assert moved.headers["location"] == "https://127.0.0.1/v1/models?limit=1"
        assert client.get("/metrics").status_code == 404


@pytest.mark.parametrize("target", ["/v1/../admin/", "/x/../v1/models", "/v1%2f..%2fadmin/", "//v1/models"])
def test_a_path_that_can_be_read_two_ways_is_refused(
    topology: Topology, topology_upstream: FakeUpstream, target: str
) -> None:
    plain = socket.create_connection(("127.0.0.1", topology.https_port), timeout=PATIENCE_S)
    with trust(topology).wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        head = connection.recv(65536).split(b"\r\n")[0]
    assert head.split()[1] in (b"400", b"404")
    assert not topology_upstream.requests


def test_all_is_ready_and_pending_migrations_turn_it_red(topology: Topology) -> None:
    with new_client(topology) as client:
        answer = client.get("/readyz")
        assert answer.status_code == 200, answer.text
        with psycopg.connect(topology.database_url(), autocommit=True) as connection:
            statement = "DELETE FROM django_migrations WHERE app = 'sessions' RETURNING app, name, applied"
            rows = connection.execute(statement).fetchall()
            try:
                answer = client.get("/readyz")
            finally:
                for row in rows:
                    connection.execute("INSERT INTO django_migrations (app, name, applied) VALUES (%s, %s, %s)", row)
        assert (answer.status_code, answer.json()["checks"]["migrations"]) == (503, f"{len(rows)} pending")
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200


def test_worker_and_beat_are_alive(topology: Topology) -> None:
    if "worker" not in topology.services:
        pytest.skip("this version runs nothing by the clock")

    def beats() -> list[tuple[object, ...]]:
        statement = "SELECT last_succeeded_at FROM proxysite_taskrun WHERE task = 'proxysite.tasks.heartbeat'"
        with psycopg.connect(topology.database_url()) as connection:
            return connection.execute(statement).fetchall()

    first = beats()
    wait_until(lambda: beats() != first, "another heartbeat")


def test_no_secret_and_no_key_stands_in_a_log_or_a_command_line(topology: Topology) -> None:
    key = "sk-topology-never-in-a-log"
    with new_client(topology) as client:
        client.post("/v1/embeddings", json={"input": "x"}, headers={"authorization": f"Bearer {key}"})
        client.get("/pro/balance", params={"apiKey": key})
        refused = client.post("/pro/balance", params={"apiKey": key}, content=bytes(16 << 20))
        assert refused.status_code == 413
        client.get("/pro/usage", headers={"authorization": f"Bearer {key}"})
    known = [path.read_text().strip() for path in topology.secrets.iterdir() if path.name != "tls_certificate"]
    logs = [*topology.directory.glob("*.log"), topology.directory / "nginx" / "access.log"]
    written = "".join(path.read_text(errors="replace") for path in logs)
    commands = "".join(" ".join(member.plan.argv) for members in topology.services.values() for member in members)
    for secret in [key, *known]:
        assert secret not in written
        assert secret not in commands
