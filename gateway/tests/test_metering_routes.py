"""Other routes than chats in the ledger; what is looked at again and again is counted once."""

from __future__ import annotations

import json

from openai import OpenAI

from gateway.tests.fake_upstream import Exchange, FakeUpstream
from gateway.tests.live import LiveProxy
from gateway.tests.metered import KEY, Ledger

RESPONSE_USAGE = {"input_tokens": 70, "output_tokens": 8, "total_tokens": 78}
OF_RESPONSES = (
    "SELECT input_tokens, output_tokens, usage_source FROM billing_usagerecord "
    "WHERE endpoint = '/v1/responses' AND input_tokens = {}"
)
IN_BACKGROUND = {"id": "resp_bg", "object": "response", "background": True, "model": "gpt-4o-mini"}
RUN = {"id": "run_1", "object": "thread.run", "model": "gpt-4o-mini", "thread_id": "thread_1"}
RUN_USAGE = {"prompt_tokens": 72, "completion_tokens": 9, "total_tokens": 81}
OF_RUNS = (
    "SELECT endpoint, input_tokens, output_tokens, usage_source, pricing FROM billing_usagerecord "
    "WHERE endpoint LIKE '/v1/threads/%' AND input_tokens = {}"
)


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


def test_a_video_is_unpriced_with_its_model_until_the_operator_enters_a_price(
    metered: LiveProxy, upstream: FakeUpstream, ledger: Ledger
) -> None:
    video = {"id": "video_1", "object": "video", "model": "sora-2", "status": "queued", "seconds": "8"}

    async def script(exchange: Exchange) -> None:
        await exchange.read_body()
        await exchange.answer(json.dumps(video).encode())

    upstream.script = script
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = {"model": "sora-2", "prompt": "a cat", "seconds": "8"}
    form = {name: (None, value) for name, value in asked.items()} | {"input_reference": ("a.png", b"PNG" * 100_000)}
    metered.post("/v1/videos", files=form, headers=headers)
    metered.post("/v1/videos", json=asked, headers=headers)
    # These name no model; the answer does.
    metered.post("/v1/videos/video_1/remix", json={"prompt": "a dog"}, headers=headers)
    metered.post("/v1/videos/edits", json={"video": {"id": "video_1"}, "prompt": "a dog"}, headers=headers)
    metered.post("/v1/videos/extensions", json={"video": {"id": "video_1"}, "prompt": "a dog"}, headers=headers)
    metered.get("/v1/videos/video_1", headers=headers)
    ledger.new(6)
    rows = metered.rows(
        "SELECT endpoint, model, pricing, cost_usd FROM billing_usagerecord WHERE endpoint LIKE '/v1/videos%' "
        "ORDER BY event_id"
    )
    assert rows == [
        ("/v1/videos", "sora-2", "unpriced", None),
        ("/v1/videos", "sora-2", "unpriced", None),
        ("/v1/videos/{video_id}/remix", "sora-2", "unpriced", None),
        ("/v1/videos/edits", "sora-2", "unpriced", None),
        ("/v1/videos/extensions", "sora-2", "unpriced", None),
        ("/v1/videos/{video_id}", "", "free", 0),
    ]


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
