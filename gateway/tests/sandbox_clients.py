"""The official SDK asking the practice upstream, which makes no pauses, and its strict models for what comes back."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterable
from typing import Any

import httpx2 as httpx
from openai import AsyncOpenAI
from pydantic import TypeAdapter

from gateway.sandbox import Pace, SandboxTransport

NO_PAUSE = Pace(event_s=0, slow_first_s=0, slow_event_s=0)
PATIENCE_S = 60  # only a failing test waits so long
BASE = "https://sandbox.invalid"
HELLO = [{"role": "user", "content": "Hello 你好 👩‍👩‍👧"}]
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
        "required": ["city", "days"],
    },
}


def new_sdk(transport: SandboxTransport | None = None, **options: Any) -> AsyncOpenAI:
    http_client = httpx.AsyncClient(transport=transport or SandboxTransport(pace=NO_PAUSE))
    return AsyncOpenAI(api_key="sk-sandbox", base_url=f"{BASE}/v1", http_client=http_client, max_retries=0, **options)


def strictly(model: Any, value: Any) -> Any:
    """Return the value as the SDK's model; the SDK itself would accept a wrong one silently."""
    return _adapter(model).validate_python(value)


@functools.cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def events_in(body: str) -> list[dict[str, Any]]:
    """Return the JSON of each SSE event but [DONE], and check `event:` lines against it."""
    events = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        *names, data = block.split("\n")
        if data != "data: [DONE]":
            event = json.loads(data.removeprefix("data: "))
            assert names in ([], [f"event: {event.get('type')}"])
            events.append(event)
    return events


async def collect(stream: AsyncIterable[Any], into: list[Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async for item in stream:
            into.append(item)
