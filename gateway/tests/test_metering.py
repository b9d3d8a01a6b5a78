"""Every request in the ledger once, with what it used: the live proxy, a real upstream, the database behind it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import socket
import zlib

import pytest
from openai import OpenAI

from billing import keys
from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import CHAT, KEY, RECORDS, USAGE, Ledger, answer_json, chunk, post
from gateway.tests.raw_client import RawClient

PACKED_KEY = base64.b64encode(f":{KEY}".encode()).decode()


def test_a_whole_answer_is_recorded_with_its_buckets(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    upstream.script = answer_json
    post(metered)
    expected = ("gpt-4o-mini-2024-07-18", 200, "completed", "upstream", 60, 40, 30, 10, "req_up", False)
    assert ledger.new() == [("/v1/chat/completions", *expected)]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read_from_a_copy(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, coding: str
) -> None:
    plain = json.dumps({"model": "m", "usage": USAGE}).encode()
    packed = gzip.compress(plain) if coding == "gzip" else zlib.compress(plain)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(packed, headers=(("content-type", "application/json"), ("content-encoding", coding)))

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=json.dumps(CHAT).encode())
        assert client.answer().body == packed
    assert ledger.new()[0][4:8] == ("upstream", 60, 40, 30)


async def stream_as_asked(exchange: Exchange) -> None:
    """Answer as OpenAI does: usage only where it was asked for."""
    request = json.loads(await exchange.read_body())
    asked = (request.get("stream_options") or {}).get("include_usage")
    nothing_yet = {"usage": None} if asked else {}
    await exchange.start_stream()
    await exchange.events(chunk("Hel", **nothing_yet), chunk("lo", **nothing_yet), done=False)
    if asked:
        await exchange.events(chunk(usage=USAGE), done=False)
    await exchange.chunk(b"data: [DONE]\n\n")
    await exchange.end_stream()


def test_a_stream_that_did_not_ask_for_usage_is_metered_and_looks_as_if_nobody_had(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    upstream.script = stream_as_asked
    body = CHAT | {"stream": True}
    answer = post(metered, body)
    sent = json.loads(upstream.requests[0].body)
    assert sent == body | {"stream_options": {"include_usage": True}}
    expected = [chunk("Hel"), chunk("lo")]
    events = [event for event in answer.text.split("\n\n") if event]
    assert [json.loads(event.removeprefix("data: ")) for event in events[:-1]] == expected
    assert events[-1] == "data: [DONE]"
    assert ledger.new()[0][2:9] == (200, "completed", "upstream", 60, 40, 30, 10)


def test_a_stream_that_asked_for_usage_gets_it(metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger) -> None:
    upstream.script = stream_as_asked
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    answer = post(metered, body)
    assert json.loads(upstream.requests[0].body) == body
    assert '"total_tokens": 130' in answer.text
    assert ledger.new()[0][4:8] == ("upstream", 60, 40, 30)


def test_a_spliced_stream_of_a_known_length_still_arrives_whole(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    events = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in (chunk("Hi"), chunk(usage=USAGE))]

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(b"".join(events) + b"data: [DONE]\n\n", headers=(("content-type", "text/event-stream"),))

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
        answer = client.answer()
    assert (answer.body, answer.end) == (events[0] + b"data: [DONE]\n\n", "whole")
    assert ledger.new()[0][2:8] == (200, "completed", "upstream", 60, 40, 30)


def test_a_compressed_stream_that_was_spliced_arrives_unpacked(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        stream = b"".join(
            b"data: " + json.dumps(event).encode() + b"\n\n" for event in (chunk("Hi"), chunk(usage=USAGE))
        )
        packed = gzip.compress(stream + b"data: [DONE]\n\n")
        headers = (("content-type", "text/event-stream"), ("content-encoding", "gzip"))
        await exchange.start_stream(headers=headers)
        for at in range(0, len(packed), 7):
            await exchange.chunk(packed[at : at + 7])
        await exchange.end_stream()

    upstream.script = script
    answer = post(metered, CHAT | {"stream": True})
    assert "content-encoding" not in answer.headers
    assert answer.text == f"data: {json.dumps(chunk('Hi'))}\n\ndata: [DONE]\n\n"
    assert ledger.new()[0][4:8] == ("upstream", 60, 40, 30)


def test_a_compressed_stream_that_was_spliced_and_breaks_off_looks_cut(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    event = b"data: " + json.dumps(chunk("Hi")).encode() + b"\n\n"

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH)
        # Without a length and not in chunks: what ends with the connection has no framing that shows a cut.
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n\r\n"
        await exchange.send(head + packed)
        await exchange.close()

    upstream.script = script
    with RawClient(metered) as client:
        client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
        answer = client.answer()
    assert answer.end == "closed"
    assert answer.body.startswith(event + b"event: error\ndata: ")
    assert ledger.new()[0][2:5] == (200, "upstream_error", "estimated")


@pytest.mark.parametrize(
    "body", [b'{"stream": true', b"\xff\xfe", b'{"stream": true, "stream_options": null}', b"[]", b'{"stream": "true"}']
)
def test_a_body_that_cannot_be_asked_for_usage_passes_as_it_is(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, body: bytes
) -> None:
    metered.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert upstream.requests[0].body == body
    ledger.new()


def test_an_upstream_that_reports_nothing_is_estimated(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello "), chunk("there, friend"))
        await exchange.end_stream()

    upstream.script = script
    post(metered, CHAT | {"stream": True})
    record = ledger.new()[0]
    assert record[3:5] == ("completed", "estimated")
    assert 5 <= record[5] <= 30
    assert 2 <= record[7] <= 8


@pytest.mark.parametrize("status", ["401 Unauthorized", "429 Too Many", "500 Oops"])
def test_errors_of_the_upstream_are_completed_requests_that_used_nothing(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, status: str
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(b'{"error": {}}', status=status)

    upstream.script = script
    post(metered)
    record = ledger.new()[0]
    assert record[2:9] == (int(status.split()[0]), "completed", "none", 0, 0, 0, 0)


def test_a_key_becomes_known_by_its_first_accepted_use_only(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(b"{}", status="401 Unauthorized")

    pepper = (metered.var_dir / "key_pepper").read_text().strip().encode()
    guess, real = b"sk-a-wrong-guess-00000000", b"sk-a-real-key-0000000000"
    for script, key in ((refuse, guess), (answer_json, real)):
        upstream.script = script  # type: ignore[assignment]
        headers = {"Authorization": f"Bearer {key.decode()}"}
        metered.post("/v1/chat/completions", json=CHAT, headers=headers)
    ledger.new(2)
    known = {row[0]: row[1] for row in metered.rows("SELECT fingerprint, hint FROM billing_apikey")}
    assert keys.fingerprint(guess, pepper=pepper) not in known
    assert known[keys.fingerprint(real, pepper=pepper)] == "sk-…0000"


# However it ends


RECORDED = b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in (chunk("Hello"), chunk(usage=USAGE)))
RECORDED += b"data: [DONE]\n\n"


@pytest.mark.slow
def test_one_record_wherever_the_upstream_cuts(metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger) -> None:
    wire = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire += b"%x\r\n%b\r\n0\r\n\r\n" % (len(RECORDED), RECORDED)
    cuts = range(0, len(wire) + 1)
    at = iter(cuts)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        cut = next(at)
        await exchange.send(wire[:cut])
        if cut < len(wire):
            await exchange.close()

    upstream.script = script
    for _ in cuts:
        with RawClient(metered) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            client.answer()
    outcomes = [record[3] for record in ledger.new(len(cuts))]
    assert set(outcomes) == {"upstream_error", "completed"}
    assert outcomes[-1] == "completed"
    reported = [record for record in metered.rows(RECORDS)[-len(cuts) :] if record[4] == "upstream"]
    assert all(record[5:8] == (60, 40, 30) for record in reported)
    assert reported


@pytest.mark.slow
def test_one_record_wherever_the_client_leaves(metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        for at in range(0, len(RECORDED), 16):
            await exchange.chunk(RECORDED[at : at + 16])
            await asyncio.sleep(0)
        await exchange.end_stream()

    upstream.script = script
    cuts = range(0, len(RECORDED) + 200, 3)
    for cut in cuts:
        with RawClient(metered) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            received = 0
            while received < cut and (data := client.socket.recv(min(64, cut - received))):
                received += len(data)
            if cut % 2:
                client.reset()
    assert {record[3] for record in ledger.new(len(cuts))} <= {"client_closed", "completed"}


def test_a_client_that_leaves_may_be_read_on_for(upstream: FakeUpstream) -> None:
    left = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello"), done=False)
        upstream.signals.put("sent")
        await left.wait()
        await exchange.events(chunk(usage=USAGE))
        await exchange.end_stream()

    upstream.script = script
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1", ON_CLIENT_DISCONNECT="drain") as proxy:
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            client.read_until(b"Hello")
        # The proxy has seen the client leave once it has answered another.
        assert proxy.get("/healthz").status_code == 200
        upstream.loop.call_soon_threadsafe(left.set)
        record = proxy.wait_for_rows(RECORDS, 1)[0]
    assert record[2:8] == (200, "client_closed", "upstream", 60, 40, 30)


def test_an_answer_that_comes_whole_after_its_client_has_left_may_be_read_on_for(upstream: FakeUpstream) -> None:
    left = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        upstream.signals.put("asked")
        await left.wait()
        await exchange.answer(json.dumps({"model": "gpt-4o-mini", "usage": USAGE}).encode())

    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1", ON_CLIENT_DISCONNECT="drain") as proxy:
        assert proxy.get("/v1/models").status_code == 200  # leaves a connection to ask on
        upstream.script = script
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b"{}")
            assert upstream.signals.get(timeout=60) == "asked"
        assert proxy.get("/healthz").status_code == 200
        upstream.loop.call_soon_threadsafe(left.set)
        record = proxy.wait_for_rows(RECORDS, 2)[1]
    assert record[2:8] == (200, "client_closed", "upstream", 60, 40, 30)


@pytest.mark.parametrize("policy", ["cancel", "drain"])
def test_what_was_never_sent_has_used_nothing(policy: str) -> None:
    with socket.socket() as full, contextlib.ExitStack() as stack:
        # A listener with a full backlog: connection attempts hang.
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            attempt = stack.enter_context(socket.socket())
            attempt.setblocking(False)
            attempt.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with LiveProxy(UPSTREAM_URL=url, JOURNAL_FLUSH_SECONDS="0.1", ON_CLIENT_DISCONNECT=policy) as proxy:
            with RawClient(proxy) as client:
                body = json.dumps(CHAT).encode()
                client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=body)
                assert proxy.get("/healthz").status_code == 200
            record = proxy.wait_for_rows(RECORDS, 1)[0]
    assert record[2:8] == (0, "client_closed", "none", 0, 0, 0)


def test_each_request_of_a_connection_is_its_own_keys(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    pepper = (metered.var_dir / "key_pepper").read_text().strip().encode()
    sent = ["sk-first", "sk-first", "sk-second", "", "sk-first", "Basic", "Basic"]
    with RawClient(metered) as client:
        for key in sent:
            # Of another scheme the key may be in the subprotocols, which the field does not tell.
            scheme = ("Authorization: Basic abc", "Sec-WebSocket-Protocol: openai-insecure-api-key.sk-")
            fields = (f"Authorization: Bearer {key}",) if key else ()
            if key == "Basic":
                fields = (scheme[0], scheme[1] + str(len(upstream.requests)))
            client.get("/v1/models", *fields)
            assert client.answer().status == 200
    ledger.new(len(sent))
    found = metered.rows(
        "SELECT COALESCE(k.fingerprint, '') FROM billing_usagerecord r LEFT JOIN billing_apikey k ON k.id = r.key_id "
        "ORDER BY started_at, event_id"
    )[-len(sent) :]
    expected = ["sk-first", "sk-first", "sk-second", "", "sk-first", "sk-5", "sk-6"]
    assert [row[0] for row in found] == [
        keys.fingerprint(key.encode(), pepper=pepper) if key else "" for key in expected
    ]


def test_no_more_is_read_on_for_a_client_that_has_left_than_allowed(upstream: FakeUpstream) -> None:
    left, piece = asyncio.Event(), chunk("Hello " * 2000)

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.start_stream()
        await exchange.events(chunk("Hello"), done=False)
        await left.wait()
        for _ in range(8000):
            await exchange.events(piece, done=False)
        await exchange.events(chunk(usage=USAGE))
        await exchange.end_stream()

    upstream.script = script
    policy = {"ON_CLIENT_DISCONNECT": "drain", "DRAIN_MAX_BYTES": "100000"}
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1", **policy) as proxy:
        with RawClient(proxy) as client:
            client.request("POST", "/v1/chat/completions", "Content-Type: application/json", body=b'{"stream":true}')
            client.read_until(b"Hello")
        assert proxy.get("/healthz").status_code == 200
        upstream.loop.call_soon_threadsafe(left.set)
        assert proxy.wait_for_rows(RECORDS, 1)[0][3] == "client_closed"
        [(read,)] = proxy.rows("SELECT response_bytes FROM billing_usagerecord")
    # And what had been read when the bound was met: at most as much as the transport holds.
    assert 100_000 < read < 1_000_000


def test_what_is_refused_here_is_recorded_as_refused(metered: LiveProxy, ledger: Ledger) -> None:
    with RawClient(metered) as client:
        client.request("POST", "/v1/files", "Content-Length: 99999999999")
        assert client.answer().status == 413
    assert ledger.new()[0][2:5] == (413, "refused", "none")


# Other routes


def test_embeddings_speech_and_transcription_are_recorded(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    answers = iter(
        [
            json.dumps(
                {"data": [], "model": "text-embedding-3-small", "usage": {"prompt_tokens": 7, "total_tokens": 7}}
            ),
            "RIFF....",
            json.dumps({"text": "hi", "usage": {"type": "duration", "seconds": 12}}),
        ]
    )

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        body = next(answers)
        kind = "audio/wav" if body.startswith("RIFF") else "application/json"
        await exchange.answer(body.encode(), headers=(("content-type", kind),))

    upstream.script = script
    client = OpenAI(api_key=KEY, base_url=f"{metered.url}/v1", max_retries=0)
    client.embeddings.create(model="text-embedding-3-small", input="hello", encoding_format="float")
    client.audio.speech.create(model="tts-1", voice="alloy", input="nineteen characters").read()
    client.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"RIFF" * 100))
    ledger.new(3)
    rows = metered.rows(
        "SELECT endpoint, model, input_tokens, characters, audio_ms FROM billing_usagerecord ORDER BY event_id"
    )[-3:]
    assert [(row[0], row[1], row[2], row[3], row[4]) for row in rows] == [
        ("/v1/embeddings", "text-embedding-3-small", 7, 0, 0),
        ("/v1/audio/speech", "tts-1", 0, 19, 0),
        ("/v1/audio/transcriptions", "whisper-1", 0, 0, 12000),
    ]


def test_a_batch_is_counted_once_however_often_it_is_looked_at(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    usage = {"input_tokens": 1000, "output_tokens": 200, "total_tokens": 1200}
    half = {"input_tokens": 500, "output_tokens": 100, "total_tokens": 600}
    batch = {"id": "batch_1", "object": "batch", "model": "gpt-4o-mini"}
    answers = [
        batch | {"status": "in_progress", "usage": half},
        *[batch | {"status": "completed", "usage": usage}] * 3,
    ]

    async def script(exchange: Exchange) -> None:
        await exchange.answer(json.dumps(answers.pop(0)).encode())

    upstream.script = script
    for _ in range(4):
        metered.get("/v1/batches/batch_1", headers={"Authorization": f"Bearer {KEY}"})
    ledger.new(5)
    assert metered.rows("SELECT SUM(input_tokens), SUM(output_tokens) FROM billing_usagerecord WHERE is_batch") == [
        (1000, 200)
    ]


RESPONSE_USAGE = {"input_tokens": 70, "output_tokens": 8, "total_tokens": 78}
OF_RESPONSES = (
    "SELECT input_tokens, output_tokens, usage_source FROM billing_usagerecord "
    "WHERE endpoint = '/v1/responses' AND input_tokens = {}"
)
IN_BACKGROUND = {"id": "resp_bg", "object": "response", "background": True, "model": "gpt-4o-mini"}


def test_a_response_in_the_background_is_counted_once_when_it_is_done(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    done = IN_BACKGROUND | {"status": "completed", "usage": RESPONSE_USAGE}
    answers = [IN_BACKGROUND | {"status": "queued", "usage": None}, done, done]

    async def script(exchange: Exchange) -> None:
        await exchange.answer(json.dumps(answers.pop(0)).encode())

    upstream.script = script
    headers = {"Authorization": f"Bearer {KEY}"}
    metered.post("/v1/responses", json={"model": "gpt-4o-mini", "input": "x", "background": True}, headers=headers)
    for _ in range(2):
        metered.get("/v1/responses/resp_bg", headers=headers)
    ledger.new(4)
    assert metered.rows(OF_RESPONSES.format(70)) == [(70, 8, "upstream")]


def test_a_stream_from_the_background_is_not_counted_again_when_it_is_looked_at(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    usage = RESPONSE_USAGE | {"input_tokens": 71, "total_tokens": 79}
    done = IN_BACKGROUND | {"id": "resp_bg_stream", "status": "completed", "usage": usage}

    async def script(exchange: Exchange) -> None:
        if exchange.request.method == "GET":
            await exchange.answer(json.dumps(done).encode())
        else:
            event = json.dumps({"type": "response.completed", "response": done}).encode()
            body = b"event: response.completed\ndata: %b\n\n" % event
            await exchange.answer(body, headers=(("content-type", "text/event-stream"),))

    upstream.script = script
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"model": "gpt-4o-mini", "input": "x", "background": True, "stream": True}
    metered.post("/v1/responses", json=asked, headers=headers)
    metered.get("/v1/responses/resp_bg_stream", headers=headers)
    ledger.new(2)
    assert metered.rows(OF_RESPONSES.format(71)) == [(71, 8, "upstream")]


@pytest.mark.parametrize("upgrade", [(), ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")])
def test_no_key_hides_behind_another(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger, upgrade: tuple[str, ...]
) -> None:
    keys_sent = ("Authorization: Bearer sk-looked-at", "authorization: Bearer sk-taken-by-the-upstream")
    key = ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",) if upgrade else ()
    with RawClient(metered) as client:
        client.get("/v1/realtime?model=m", *keys_sent, *upgrade, *key)
        head = client.read_until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert not upstream.requests
    assert ledger.new(1)[0][2:5] == (400, "refused", "none")


RUN = {"id": "run_1", "object": "thread.run", "model": "gpt-4o-mini", "thread_id": "thread_1"}
RUN_USAGE = {"prompt_tokens": 72, "completion_tokens": 9, "total_tokens": 81}
OF_RUNS = (
    "SELECT endpoint, input_tokens, output_tokens, usage_source, pricing FROM billing_usagerecord "
    "WHERE endpoint LIKE '/v1/threads/%' AND input_tokens = {}"
)


def test_a_run_that_is_polled_is_counted_once_when_it_is_done(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    done = RUN | {"status": "completed", "usage": RUN_USAGE}
    answers = [RUN | {"status": "queued", "usage": None}, RUN | {"status": "in_progress", "usage": None}, done, done]

    async def script(exchange: Exchange) -> None:
        await exchange.answer(json.dumps(answers.pop(0)).encode())

    upstream.script = script
    headers = {"Authorization": f"Bearer {KEY}"}
    metered.post("/v1/threads/thread_1/runs", json={"assistant_id": "asst_1"}, headers=headers)
    for _ in range(3):
        metered.get("/v1/threads/thread_1/runs/run_1", headers=headers)
    ledger.new(5)
    assert metered.rows(OF_RUNS.format(72)) == [("/v1/threads/{thread_id}/runs", 72, 9, "upstream", "priced")]


def test_a_streamed_run_is_not_counted_again_when_it_is_looked_at(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    done = RUN | {"id": "run_2", "status": "completed", "usage": RUN_USAGE | {"prompt_tokens": 73, "total_tokens": 82}}

    async def script(exchange: Exchange) -> None:
        if exchange.request.method == "GET":
            await exchange.answer(json.dumps(done).encode())
        else:
            body = b"event: thread.run.completed\ndata: %b\n\nevent: done\ndata: [DONE]\n\n" % json.dumps(done).encode()
            await exchange.answer(body, headers=(("content-type", "text/event-stream"),))

    upstream.script = script
    headers = {"Authorization": f"Bearer {KEY}"}
    metered.post("/v1/threads/runs", json={"assistant_id": "asst_1", "stream": True}, headers=headers)
    metered.get("/v1/threads/thread_1/runs/run_2", headers=headers)
    ledger.new(2)
    assert [row[:4] for row in metered.rows(OF_RUNS.format(73))] == [("/v1/threads/runs", 73, 9, "upstream")]


def test_what_is_done_to_a_stored_answer_costs_nothing_and_is_no_riddle(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    stored = {"id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-4o-mini", "usage": RUN_USAGE}

    async def script(exchange: Exchange) -> None:
        await exchange.answer(json.dumps(stored).encode())

    upstream.script = script
    metered.post(
        "/v1/chat/completions/chatcmpl-1", json={"metadata": {"a": "b"}}, headers={"Authorization": f"Bearer {KEY}"}
    )
    ledger.new(1)
    rows = metered.rows(
        "SELECT pricing, input_tokens FROM billing_usagerecord WHERE endpoint = '/v1/chat/completions/{completion_id}'"
    )
    assert rows == [("free", 0)]


def test_a_key_that_the_operator_blocks_is_refused(upstream: FakeUpstream) -> None:
    upstream.script = answer_json
    block = (
        "from billing.models import ApiKey; from billing.services import block_key;"
        "[block_key(key) for key in ApiKey.objects.all()]"
    )
    with LiveProxy(UPSTREAM_URL=upstream.url, JOURNAL_FLUSH_SECONDS="0.1") as proxy:
        assert post(proxy).status_code == 200
        proxy.wait_for_rows("SELECT 1 FROM billing_apikey", 1)
        proxy.manage("shell", "-c", block)
        upstream.requests.clear()
        answers = iter(lambda: post(proxy), None)
        refused = next(answer for answer in answers if answer.status_code != 200)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "key_blocked"
        forms = ({"api-key": KEY}, {"x-api-key": KEY}, {"Authorization": KEY}, {"Authorization": f"Basic {PACKED_KEY}"})
        for headers in forms:
            assert proxy.get("/v1/models", headers=headers).status_code == 403
