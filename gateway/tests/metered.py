"""What tests of metering share: requests with a known usage, and the records that come of them."""

from __future__ import annotations

import json
from typing import Any

from gateway.tests.fake_upstream import Exchange
from gateway.tests.live import LiveProxy

KEY = "sk-metering-0123456789abcdef"
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 30,
    "total_tokens": 130,
    "prompt_tokens_details": {"cached_tokens": 40},
    "completion_tokens_details": {"reasoning_tokens": 10},
}
RECORDS = (
    "SELECT endpoint, model, status, outcome, usage_source, input_tokens, cached_input_tokens, output_tokens, "
    "reasoning_tokens, upstream_request_id, is_stream FROM billing_usagerecord ORDER BY started_at, event_id"
)
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello, how are you?"}]}


class Ledger:
    """The records of one test alone: those with the next ids."""

    def __init__(self, proxy: LiveProxy) -> None:
        self.proxy = proxy
        self._before = len(proxy.rows(RECORDS))

    def new(self, count: int = 1) -> list[tuple[Any, ...]]:
        found = self.proxy.wait_for_rows(RECORDS, self._before + count)[self._before :]
        assert len(found) == count
        self._before += count
        return found


def chunk(content: str | None = None, **more: object) -> dict[str, object]:
    choices = [] if content is None else [{"index": 0, "delta": {"content": content}, "finish_reason": None}]
    return {"id": "c", "object": "chat.completion.chunk", "model": "gpt-4o-mini-2024-07-18", "choices": choices, **more}


def post(proxy: LiveProxy, body: object = CHAT, target: str = "/v1/chat/completions") -> Any:
    return proxy.post(target, json=body, headers={"Authorization": f"Bearer {KEY}"})


async def answer_json(exchange: Exchange) -> None:
    await exchange.read_body()
    body = json.dumps({"model": "gpt-4o-mini-2024-07-18", "choices": [{}], "usage": USAGE}).encode()
    await exchange.answer(body, headers=(("content-type", "application/json"), ("x-request-id", "req_up")))
