"""An upstream that counts for itself what it has told each client that it used."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from typing import Any

from gateway.tests.exact_plans import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, WORD, Buckets, Fate, Plan
from gateway.tests.fake_upstream import Exchange

JSON = "application/json"


class CountingUpstream:
    """The script of a `FakeUpstream`: plays each plan, and keeps its own books, by the plan's number.

    `told` is the usage that was put on the wire, `words` those of its answer; `asked` how often each plan arrived.
    """

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.asked: Counter[int] = Counter()
        self.told: dict[int, Buckets] = {}
        self.words: Counter[int] = Counter()
        self.tiers: dict[int, str] = {}
        self.spliced = 0
        self.problems: list[str] = []
        self.has_arrived = {plan.number: asyncio.Event() for plan in plans if plan.fate is Fate.CLIENT_BEFORE_HEAD}
        self.has_been_seen = {plan.number: asyncio.Event() for plan in plans if _is_cut_once_seen(plan)}

    async def play(self, exchange: Exchange) -> None:
        plan = self.plans[int(exchange.request.value("x-number") or -1)]
        request = json.loads(await exchange.read_body())
        self.asked[plan.number] += 1
        self._look_at(plan, request)
        if plan.fate is Fate.REFUSED:
            await _refuse(exchange, plan, "429 Too Many Requests")
        elif plan.fate is Fate.WRONG_KEY:
            await _refuse(exchange, plan, "401 Unauthorized")
        elif plan.fate is Fate.CLIENT_BEFORE_HEAD:
            self.has_arrived[plan.number].set()
            await exchange.wait_until_client_leaves()
            await exchange.close()
        elif plan.fate is Fate.UPSTREAM_BEFORE_HEAD:
            await _drop(exchange, with_reset=plan.number % 2 == 0)
        else:
            await self._answer(exchange, plan, Answer(plan, asked_for_usage=_asks_for_usage(request)))

    async def _answer(self, exchange: Exchange, plan: Plan, answer: Answer) -> None:
        self.tiers[plan.number] = answer.tier
        if plan.streams:
            await self._stream(exchange, plan, answer)
        else:
            await self._send_json(exchange, plan, answer)

    async def _stream(self, exchange: Exchange, plan: Plan, answer: Answer) -> None:
        await exchange.start_stream(headers=(("content-type", "text/event-stream"), ("x-request-id", plan.request_id)))
        await exchange.events(*answer.beginning(), done=False)
        for _ in range(plan.words):
            self.words[plan.number] += 1
            await exchange.events(answer.word(), done=False)
        if plan.fate.is_midway:
            await self._end_early(exchange, plan)
            return
        if (usage := answer.usage_event()) is not None:
            self.told[plan.number] = answer.buckets
            await exchange.events(usage, done=False)
        if plan.fate.is_after_usage:
            await self._end_early(exchange, plan)
            return
        if plan.route != RESPONSES:
            await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.end_stream()

    async def _send_json(self, exchange: Exchange, plan: Plan, answer: Answer) -> None:
        body, cut_at = answer.json()
        is_cut = plan.fate.is_midway or plan.fate.is_after_usage
        self.words[plan.number] = plan.words if plan.route != EMBEDDINGS else 0
        if not is_cut or plan.fate.is_after_usage:
            self.told[plan.number] = answer.buckets
        lines = ["HTTP/1.1 200 OK", f"content-type: {JSON}", f"x-request-id: {plan.request_id}"]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode()
        await exchange.send(head + (body[:cut_at] if is_cut else body))
        if is_cut:
            await self._end_early(exchange, plan)

    async def _end_early(self, exchange: Exchange, plan: Plan) -> None:
        if plan.fate in (Fate.CLIENT_MIDWAY, Fate.CLIENT_AFTER_USAGE):
            await exchange.wait_until_client_leaves()
            await exchange.close()
            return
        if plan.number in self.has_been_seen:
            # A reset may overtake what was sent before it.
            await self.has_been_seen[plan.number].wait()
        await _drop(exchange, with_reset=plan.number in self.has_been_seen)

    def _look_at(self, plan: Plan, request: dict[str, Any]) -> None:
        """Note a request that is neither what its client wrote nor that with usage asked for."""
        expected = plan.body()
        if plan.client != "raw" and plan.route == EMBEDDINGS:
            request.pop("encoding_format", None)
        if plan.streams and not plan.asks_usage and plan.route in (CHAT, COMPLETIONS):
            self.spliced += 1
            expected["stream_options"] = {"include_usage": True}
        if request != expected and not (plan.client != "raw" and expected | request == request):
            self.problems.append(f"request {plan.number} arrived as {request!r}")


class Answer:
    """What the upstream says to one request; its usage is drawn by the plan's number and nobody else's business."""

    def __init__(self, plan: Plan, *, asked_for_usage: bool) -> None:
        draw = random.Random(plan.number)
        self._plan = plan
        self._asked_for_usage = asked_for_usage
        self.buckets = _drawn_buckets(plan, draw)
        # Asked for a tier, an upstream may serve the standard one: that is then what counts.
        self.tier = draw.choice((plan.tier, "default")) if plan.tier else "default"
        self._head = {"id": f"answer-{plan.number}", "model": plan.model.answers_as, "service_tier": self.tier}

    def beginning(self) -> list[dict[str, Any]]:
        if self._plan.route != RESPONSES:
            return []
        response = self._head | {"object": "response", "created_at": 1, "status": "in_progress", "output": []}
        return [{"type": "response.created", "response": response | _RESPONSE_FIELDS, "sequence_number": 0}]

    def word(self) -> dict[str, Any]:
        if self._plan.route == RESPONSES:
            place = {"item_id": "m", "output_index": 0, "content_index": 0, "sequence_number": 1, "logprobs": []}
            return {"type": "response.output_text.delta", "delta": WORD} | place
        usage_yet = {"usage": None} if self._asked_for_usage else {}
        if self._plan.route == COMPLETIONS:
            choice: dict[str, Any] = {"index": 0, "text": WORD, "finish_reason": None, "logprobs": None}
        else:
            choice = {"index": 0, "delta": {"content": WORD}, "finish_reason": None}
        return self._chunk() | {"choices": [choice]} | usage_yet

    def usage_event(self) -> dict[str, Any] | None:
        """Return the event that tells the usage; None where it was not asked for."""
        if self._plan.route == RESPONSES:
            return {"type": "response.completed", "response": self._response(), "sequence_number": 2}
        return self._chunk() | {"choices": [], "usage": chat_usage(self.buckets)} if self._asked_for_usage else None

    def json(self) -> tuple[bytes, int]:
        """Return the whole answer, and where to cut it: before its usage, or behind if that stands first."""
        plan = self._plan
        text = WORD * plan.words
        if plan.route == RESPONSES:
            members = self._response()
            usage = members.pop("usage")
            cut_behind = text
        elif plan.route == EMBEDDINGS:
            vectors = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25, 0.125]}]
            members = self._head | {"object": "list", "data": vectors}
            usage = {"prompt_tokens": self.buckets.input, "total_tokens": self.buckets.input}
            cut_behind = "-0.25"
        else:
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
            choice |= {"text": text} if plan.route == COMPLETIONS else {"message": message}
            kind = "text_completion" if plan.route == COMPLETIONS else "chat.completion"
            members = self._head | {"object": kind, "created": 1, "choices": [choice]}
            usage = chat_usage(self.buckets)
            cut_behind = text
        whole = {"usage": usage} | members if plan.usage_first else members | {"usage": usage}
        body = json.dumps(whole).encode()
        return body, body.index(cut_behind.encode()) + len(cut_behind)

    def _chunk(self) -> dict[str, Any]:
        kind = "text_completion" if self._plan.route == COMPLETIONS else "chat.completion.chunk"
        return self._head | {"object": kind, "created": 1}

    def _response(self) -> dict[str, Any]:
        text = {"type": "output_text", "text": WORD * self._plan.words, "annotations": []}
        message = {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": [text]}
        head = self._head | {"object": "response", "created_at": 1, "status": "completed", "output": [message]}
        return head | _RESPONSE_FIELDS | {"usage": response_usage(self.buckets)}


_RESPONSE_FIELDS = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}


def chat_usage(used: Buckets) -> dict[str, Any]:
    """Return OpenAI's usage of a chat or text completion, in which each total contains its details."""
    read = used.input + used.cached_input + used.cache_write + used.audio_input
    written = used.output + used.audio_output
    cached = {"cached_tokens": used.cached_input, "cache_write_tokens": used.cache_write}
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": cached | {"audio_tokens": used.audio_input},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning, "audio_tokens": used.audio_output},
    }


def response_usage(used: Buckets) -> dict[str, Any]:
    """Return OpenAI's usage of a response."""
    read = used.input + used.cached_input + used.cache_write
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": used.cached_input, "cache_write_tokens": used.cache_write},
        "output_tokens": used.output,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": read + used.output,
    }


def _drawn_buckets(plan: Plan, draw: random.Random) -> Buckets:
    used = plan.model.used
    counts = {name: draw.randint(0, 3000) for name in Buckets._fields if name in used and draw.random() < 0.7}
    counts["input"] = draw.randint(1, 5000)
    if plan.route != EMBEDDINGS:
        counts["output"] = draw.randint(1, 2000) + counts.get("reasoning", 0)
    return Buckets(**counts)


def _asks_for_usage(request: dict[str, Any]) -> bool:
    return bool((request.get("stream_options") or {}).get("include_usage"))


def _is_cut_once_seen(plan: Plan) -> bool:
    return plan.client == "raw" and plan.streams and plan.fate is Fate.UPSTREAM_MIDWAY and plan.number % 2 == 0


async def _refuse(exchange: Exchange, plan: Plan, status: str) -> None:
    body = json.dumps({"error": {"message": "no", "type": "x", "param": None, "code": None}}).encode()
    await exchange.answer(body, status=status, headers=(("content-type", JSON), ("x-request-id", plan.request_id)))


async def _drop(exchange: Exchange, *, with_reset: bool) -> None:
    if with_reset:
        connection = exchange.writer.get_extra_info("socket")
        if connection is not None:  # the other side has not left already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.abort()
    else:
        await exchange.close()
