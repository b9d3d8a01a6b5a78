"""An upstream that can be told to fail: chat completions whose numbers prove afterwards what was counted.

Each request has a number: in `x-request-id` as `req-N`, and as its prompt tokens. A path before /v1 comes back in
`x-gateway`. The model says what happens: `fault-500`, `fault-cut` in the middle of a stream, anything else is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")
_DONE = b"data: [DONE]\n\n"


class FaultyUpstream:
    """The server, on a thread with an event loop of its own; each event holds the time at which it was sent."""

    def __init__(self, *, events: int, interval_s: float) -> None:
        self.answered: set[int] = set()  # requests whose answer was begun
        self.port = 0
        self._events = events
        self._interval_s = interval_s
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-upstream", daemon=True)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyUpstream:
        self._thread.start()
        self.come_back()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.go_away()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def go_away(self) -> None:
        """Cut every connection and refuse new ones."""
        self._run(self._close())

    def come_back(self) -> None:
        """Listen, on the same port as before."""
        self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        target = head[0].split(" ")[1]
        fields = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
        body = json.loads(await reader.readexactly(int(fields.get("content-length", "0"))) or b"{}")
        number = next(self._numbers)
        common = f"x-request-id: req-{number}\r\nx-gateway: {target.partition('/v1')[0].strip('/')}\r\n"
        usage = {"prompt_tokens": number, "completion_tokens": 2, "total_tokens": number + 2}
        self.answered.add(number)
        if body.get("model") == "fault-500":
            await _send_whole(writer, b'{"error": {"message": "as asked"}}', common, status="500 Internal Server Error")
        elif body.get("stream"):
            await self._stream(writer, common, usage, is_cut=body.get("model") == "fault-cut")
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
            answer = {"object": "chat.completion", "model": body.get("model"), "choices": [choice], "usage": usage}
            await _send_whole(writer, json.dumps(answer).encode(), common)

    async def _stream(self, writer: asyncio.StreamWriter, common: str, usage: Any, *, is_cut: bool) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{common}transfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        chunk = {"object": "chat.completion.chunk", "model": "gpt-4o-mini"}
        for position in range(self._events):
            delta = {"choices": [{"index": 0, "delta": {"content": "x"}}], "sent_at": time.monotonic()}
            await _send_chunk(writer, _event(chunk | delta))
            if is_cut and position == self._events // 2:
                writer.transport.abort()
                raise ConnectionAbortedError
            await asyncio.sleep(self._interval_s)
        await _send_chunk(writer, _event(chunk | {"choices": [], "usage": usage}) + _DONE)
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


async def _send_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


async def _send_whole(writer: asyncio.StreamWriter, body: bytes, common: str, *, status: str = "200 OK") -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{common}content-length: {len(body)}\r\n\r\n"
    with contextlib.suppress(ConnectionError):
        writer.write(head.encode() + body)
        await writer.drain()
