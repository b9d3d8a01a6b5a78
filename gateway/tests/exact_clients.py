"""Clients that carry out plans: one of plain sockets, fast enough for thousands, and OpenAI's own, sync and async."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
from openai import AsyncOpenAI, OpenAI

from gateway.tests.exact_plans import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, WORD, Fate, Plan
from gateway.tests.exact_upstream import CountingUpstream

_WORD = WORD.encode()
_SOCKETS = 32
_ASYNC_CALLS = 12
_THREADS = 3


class Seen(NamedTuple):
    """What the client saw: `status` 0 is no answer; `words` of the answer's; `is_whole` by its own framing."""

    status: int
    words: int
    is_whole: bool
    saw_usage: bool


# Plain sockets


async def run_raw(port: int, plans: Iterable[Plan], upstream: CountingUpstream) -> dict[int, Seen]:
    """Carry the plans out over kept-alive connections; on the upstream's own event loop, to know when it has heard."""
    seen: dict[int, Seen] = {}
    waiting = iter(plans)

    async def one_after_the_other() -> None:
        connection = _Connection(port, upstream)
        for plan in waiting:
            seen[plan.number] = await connection.carry_out(plan)
        connection.close()

    await asyncio.gather(*(one_after_the_other() for _ in range(_SOCKETS)))
    return seen


class _Connection:
    def __init__(self, port: int, upstream: CountingUpstream) -> None:
        self._port = port
        self._upstream = upstream
        self._writer: asyncio.StreamWriter | None = None

    async def carry_out(self, plan: Plan) -> Seen:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(plan.raw_request())
        if plan.fate is Fate.CLIENT_BEFORE_HEAD:
            await self._upstream.has_arrived[plan.number].wait()
            self._leave(plan)
            return Seen(0, 0, False, False)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        body, is_whole = await self._body(plan, head.lower())
        if plan.fate in (Fate.CLIENT_MIDWAY, Fate.CLIENT_AFTER_USAGE):
            self._leave(plan)
        elif not is_whole or b"\r\nconnection: close" in head.lower():
            self.close()
        return Seen(status, _words(plan, body), is_whole, _has_usage(body))

    async def _body(self, plan: Plan, head: bytes) -> tuple[bytes, bool]:
        if b"transfer-encoding: chunked" in head:
            return await self._chunks(plan)
        size = int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
        if plan.fate is Fate.CLIENT_MIDWAY or plan.fate is Fate.CLIENT_AFTER_USAGE:
            return await self._reader.read(size), False  # whatever there is: the upstream sends no more
        try:
            return await self._reader.readexactly(size), True
        except asyncio.IncompleteReadError as exc:
            return exc.partial, False
        except ConnectionError:
            return b"", False

    async def _chunks(self, plan: Plan) -> tuple[bytes, bool]:
        body = b""
        try:
            while size := int(await self._reader.readline(), 16):
                body += (await self._reader.readexactly(size + 2))[:-2]
                if plan.fate is Fate.CLIENT_MIDWAY and _words(plan, body) == plan.words:
                    return body, False
                if plan.fate is Fate.CLIENT_AFTER_USAGE and _has_usage(body):
                    return body, False
                if plan.number in self._upstream.has_been_seen and _words(plan, body) == plan.words:
                    self._upstream.has_been_seen[plan.number].set()
            await self._reader.readline()
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            return body, False
        return body, True

    def _leave(self, plan: Plan) -> None:
        """Close the connection: every other time with a reset."""
        assert self._writer is not None
        if plan.number % 2:
            connection = self._writer.get_extra_info("socket")
            if connection is not None:  # the other side has not left already
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def _words(plan: Plan, body: bytes) -> int:
    # In a stream each word is a string by itself; a last event may say all of them again, an error have one as well.
    return body.count(b'"' + _WORD + b'"') - _said_again(plan, body) if plan.streams else body.count(_WORD)


def _said_again(plan: Plan, body: bytes) -> int:
    return plan.words == 1 and plan.route == RESPONSES and b"response.completed" in body


def _has_usage(body: bytes) -> bool:
    return b'"usage": {' in body


# OpenAI's own


async def run_async(url: str, plans: Iterable[Plan]) -> dict[int, Seen]:
    """Carry the plans out with AsyncOpenAI."""
    seen: dict[int, Seen] = {}
    waiting = iter(plans)
    async with AsyncOpenAI(api_key="-", base_url=f"{url}/v1", max_retries=0, timeout=60) as client:

        async def one_after_the_other() -> None:
            for plan in waiting:
                seen[plan.number] = await _ask_async(client, plan)

        await asyncio.gather(*(one_after_the_other() for _ in range(_ASYNC_CALLS)))
    return seen


async def _ask_async(client: AsyncOpenAI, plan: Plan) -> Seen:
    told = _Told(plan)
    try:
        answer = await _method(client, plan)(**_arguments(plan))
        if not plan.streams:
            return told.of_whole(answer)
        async for event in answer:
            if told.take(event):
                break
        await answer.close()
    except openai.APIError as error:
        return told.of_error(error)
    return told.of_stream()


def run_sync(url: str, plans: Iterable[Plan]) -> dict[int, Seen]:
    """Carry the plans out with OpenAI, in threads."""
    with (
        OpenAI(api_key="-", base_url=f"{url}/v1", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        plans = list(plans)
        answers = threads.map(lambda plan: _ask(client, plan), plans)
        return {plan.number: seen for plan, seen in zip(plans, answers, strict=True)}


def _ask(client: OpenAI, plan: Plan) -> Seen:
    told = _Told(plan)
    try:
        answer = _method(client, plan)(**_arguments(plan))
        if not plan.streams:
            return told.of_whole(answer)
        with contextlib.closing(answer):
            for event in answer:
                if told.take(event):
                    break
    except openai.APIError as error:
        return told.of_error(error)
    return told.of_stream()


class _Told:
    """What a client of OpenAI's has been told so far."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._words = 0
        self._saw_usage = False
        self._status = 0

    def take(self, event: Any) -> bool:
        """Take an event of the stream; return whether the plan is to leave now."""
        self._status = 200
        if self._plan.route == RESPONSES:
            self._words += event.type == "response.output_text.delta"
            self._saw_usage |= event.type == "response.completed"
        else:
            self._words += len(event.choices)
            self._saw_usage |= event.usage is not None
        return self._plan.fate is Fate.CLIENT_MIDWAY and self._words == self._plan.words

    def of_stream(self) -> Seen:
        return Seen(self._status, self._words, self._plan.fate is not Fate.CLIENT_MIDWAY, self._saw_usage)

    def of_error(self, error: openai.APIError) -> Seen:
        status = error.status_code if isinstance(error, openai.APIStatusError) else self._status
        is_whole = isinstance(error, openai.APIStatusError)
        return Seen(status, self._words, is_whole, self._saw_usage)

    def of_whole(self, answer: Any) -> Seen:
        texts = {
            CHAT: lambda: answer.choices[0].message.content,
            COMPLETIONS: lambda: answer.choices[0].text,
            RESPONSES: lambda: answer.output_text,
            EMBEDDINGS: lambda: "",
        }
        return Seen(200, texts[self._plan.route]().count(WORD), True, answer.usage is not None)


def _method(client: Any, plan: Plan) -> Any:
    resources = {
        CHAT: lambda: client.chat.completions,
        COMPLETIONS: lambda: client.completions,
        RESPONSES: lambda: client.responses,
        EMBEDDINGS: lambda: client.embeddings,
    }
    return resources[plan.route]().create


def _arguments(plan: Plan) -> dict[str, Any]:
    arguments = plan.body()
    headers = {"Authorization": f"Bearer {plan.key.api_key}", "X-Number": str(plan.number)}
    if plan.route == EMBEDDINGS:
        arguments["encoding_format"] = "float"
    if plan.route in (COMPLETIONS, EMBEDDINGS) and "service_tier" in arguments:
        arguments["extra_body"] = {"service_tier": arguments.pop("service_tier")}
    return arguments | {"extra_headers": headers}
