"""A fake OpenAI so cheap that it is not what gets measured: one process, one loop, precomputed bytes.

POST /v1/chat/completions                    an 800-byte JSON answer
     with "stream":true, ?rate=R             one event at once; R a second, without end, from GET /bench/go on
     with "model":"slow"                     the same answer after SLOW_ANSWER_S
GET  /v1/files/x/content?bytes=N             N bytes
POST /v1/files                               swallows the body, answers with a small JSON
GET  /bench/go                               see above
GET  /bench/streams                          how many event streams are open now

Started as `python -m bench.upstream CERT KEY`; prints its two ports as JSON and ends when stdin does.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import ssl
import sys
import time
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import uvloop

ANSWER_BYTES = 800
EVENT_BYTES = 250
SLOTS_PER_PERIOD = 50  # streams are spread over the period, as independent users would be
HEADS_REMEMBERED = 256
BACKLOG_MAX_BYTES = 1_000_000  # of one stream whose reader does not keep up
BLOCK = b"\0" * 262_144

SLOW_MODEL = "slow"
SLOW_ANSWER_S = 5.0

STAMP_MARK = b'"@'  # stands before STAMP_DIGITS digits: CLOCK_MONOTONIC in µs when the event was due
STAMP_DIGITS = 16

# One buffer for all connections: a read is parsed before the loop gives the buffer to the next one.
_read_buffer = memoryview(bytearray(262_144))


def _answer(body: bytes, content_type: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (content_type, len(body))
    return head + body


def _padded(payload: str, size_bytes: int) -> bytes:
    """Return payload with its `#` replaced by as many letters as make it size_bytes long."""
    return payload.replace("#", "x" * (size_bytes - len(payload) + 1)).encode()


COMPLETION = _answer(
    _padded(
        '{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":'
        '[{"index":0,"message":{"role":"assistant","content":"#","refusal":null},"logprobs":null,'
        '"finish_reason":"stop"}],"usage":{"prompt_tokens":20,"completion_tokens":80,"total_tokens":100}}',
        ANSWER_BYTES,
    )
)
FILE_CREATED = _answer(b'{"id":"file-bench","object":"file","bytes":0,"purpose":"assistants"}')
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def _frame_template() -> tuple[bytes, bytes]:
    """Return one chunk of HTTP holding one event, as the bytes before and after its stamp."""
    stamp = STAMP_MARK.decode() + "0" * STAMP_DIGITS
    event = _padded(
        'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o",'
        '"choices":[{"index":0,"delta":{"content":' + stamp + '#"},"logprobs":null,"finish_reason":null}]}\n\n',
        EVENT_BYTES,
    )
    frame = b"%x\r\n%b\r\n" % (len(event), event)
    at = frame.index(STAMP_MARK) + len(STAMP_MARK)
    return frame[:at], frame[at + STAMP_DIGITS :]


FRAME_HEAD, FRAME_TAIL = _frame_template()


def frame_due_at(due_ns: int) -> bytes:
    return FRAME_HEAD + b"%016d" % (due_ns // 1000) + FRAME_TAIL


class Wheel:
    """Sends one event per period to each of its streams, each slot of streams at its own time."""

    def __init__(self, rate_per_s: int) -> None:
        self._period_ns = round(1e9 / rate_per_s)
        self._slots: list[set[Connection]] = [set() for _ in range(SLOTS_PER_PERIOD)]
        self._next_slot = 0
        self._turning = False
        self._start_ns = 0
        self._ticks = 0

    def add(self, connection: Connection) -> set[Connection]:
        """Return the slot that the connection now has its place in."""
        slot = self._slots[self._next_slot]
        slot.add(connection)
        self._next_slot = (self._next_slot + 1) % SLOTS_PER_PERIOD
        return slot

    def start(self) -> None:
        """Turn until there is no stream left; opening thousands is quicker while the open ones are silent."""
        if not self._turning:
            self._turning = True
            # The stamps come from the clock that the clients read; the loop's own is the same one in ms.
            self._start_ns = time.monotonic_ns()
            self._ticks = 0
            self._turn()

    def _due_ns(self) -> int:
        return self._start_ns + self._ticks * self._period_ns // SLOTS_PER_PERIOD

    def _turn(self) -> None:
        for _ in range(SLOTS_PER_PERIOD):  # one that is late for good must still hear that its clients left
            if (due_ns := self._due_ns()) > time.monotonic_ns():
                break
            frame = frame_due_at(due_ns)
            for connection in self._slots[self._ticks % SLOTS_PER_PERIOD]:
                connection.send_now(frame)
            self._ticks += 1
        self._turning = any(self._slots)
        if self._turning:
            wait_s = (self._due_ns() - time.monotonic_ns()) / 1e9
            asyncio.get_running_loop().call_later(max(0.0, wait_s), self._turn)


@dataclass(frozen=True, slots=True)
class Head:
    """What one request head asks for; heads repeat, so each is read once."""

    method: bytes
    path: str
    query: dict[str, list[str]]
    body_bytes: int

    def number(self, name: str) -> int:
        return int(self.query.get(name, ["0"])[0])


_heads: dict[bytes, Head] = {}


def parse_head(raw: bytes) -> Head:
    """Return the request in raw; a body without a Content-Length counts as empty."""
    head = _heads.get(raw)
    if head is None:
        lines = raw.split(b"\r\n")
        method, target, _ = lines[0].split(b" ", 2)
        lengths = [int(line[15:]) for line in lines[1:] if line[:15].lower() == b"content-length:"]
        url = urlsplit(target.decode())
        head = Head(method, url.path, parse_qs(url.query), lengths[0] if lengths else 0)
        if len(_heads) >= HEADS_REMEMBERED:
            _heads.clear()
        _heads[raw] = head
    return head


class Connection(asyncio.BufferedProtocol):
    """One connection from the proxy: requests one after another, answered from precomputed bytes."""

    wheels: dict[int, Wheel] = {}
    streams = 0

    def __init__(self) -> None:
        self._slot: set[Connection] | None = None
        self._transport: asyncio.Transport
        self._fd = -1
        self._unread = b""
        self._upload_left = 0
        self._download_left = 0
        self._streaming = False
        self._writable = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._fd = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fd = -1
        self._download_left = 0
        self._leave_wheel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._feed(_read_buffer[:nbytes])

    def _seal(self, data: bytes) -> bytes:
        """Return data as it goes onto the wire."""
        return data

    def _write(self, data: bytes) -> None:
        self._transport.write(self._seal(data))

    def _write_late(self, data: bytes) -> None:
        if self._fd >= 0:
            self._write(data)

    def _feed(self, data: memoryview) -> None:
        if self._upload_left > len(data):
            self._upload_left -= len(data)
            return
        self._unread += bytes(data[self._upload_left :])
        if self._upload_left:
            self._upload_left = 0
            self._write(FILE_CREATED)
        while self._unread and self._take_request():
            pass

    def _take_request(self) -> bool:
        """Answer the first whole request in the unread bytes; False when there is none."""
        end = self._unread.find(b"\r\n\r\n") + 4
        if end == 3:
            return False
        head = parse_head(self._unread[:end])
        total = end + head.body_bytes
        if len(self._unread) < total:
            if head.path != "/v1/files":
                return False
            self._upload_left = total - len(self._unread)
            self._unread = b""
            return False
        body = self._unread[end:total]
        self._unread = self._unread[total:]
        self._answer(head, body)
        return True

    def _answer(self, head: Head, body: bytes) -> None:
        if head.path == "/v1/chat/completions":
            if b'"stream":true' in body:
                self._start_stream(head.number("rate"))
            elif b'"model":"%b"' % SLOW_MODEL.encode() in body:
                asyncio.get_running_loop().call_later(SLOW_ANSWER_S, self._write_late, COMPLETION)
            else:
                self._write(COMPLETION)
        elif head.path == "/v1/files":
            self._write(FILE_CREATED)
        elif head.path == "/v1/files/x/content":
            self._start_download(head.number("bytes"))
        elif head.path == "/bench/go":
            for wheel in self.wheels.values():
                wheel.start()
            self._write(_answer(b"{}"))
        elif head.path == "/bench/streams":
            self._write(_answer(b'{"streams":%d}' % Connection.streams))
        else:
            self._write(NOT_FOUND)

    def send_now(self, frame: bytes) -> None:
        """Write a frame with one system call where the kernel takes it whole, else through the loop."""
        backlog_bytes = self._transport.get_write_buffer_size()
        if self._fd < 0 or backlog_bytes > BACKLOG_MAX_BYTES:
            return  # left out: the client counts what arrives
        sealed = self._seal(frame)
        if backlog_bytes:
            self._transport.write(sealed)
            return
        try:
            sent = os.write(self._fd, sealed)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._transport.abort()
            return
        if sent < len(sealed):
            self._transport.write(sealed[sent:])

    def _start_stream(self, rate_per_s: int) -> None:
        self._streaming = True
        Connection.streams += 1
        self._write(STREAM_HEAD + frame_due_at(time.monotonic_ns()))
        if rate_per_s:
            if rate_per_s not in self.wheels:
                self.wheels[rate_per_s] = Wheel(rate_per_s)
            self._slot = self.wheels[rate_per_s].add(self)

    def _leave_wheel(self) -> None:
        if self._slot is not None:
            self._slot.discard(self)
            self._slot = None
        if self._streaming:
            self._streaming = False
            Connection.streams -= 1

    def _start_download(self, size_bytes: int) -> None:
        self._write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % size_bytes
        )
        self._download_left = size_bytes
        self._continue_download()

    def _continue_download(self) -> None:
        while self._download_left and self._writable:
            block = BLOCK[: self._download_left]
            self._download_left -= len(block)
            self._write(block)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._continue_download()


class TlsConnection(Connection):
    """The same behind TLS; uvloop's own costs twice as much for each event."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self._sealed_in, self._sealed_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._sealed_in, self._sealed_out, server_side=True)
        self._greeted = False

    def _seal(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._sealed_out.read()

    def buffer_updated(self, nbytes: int) -> None:
        self._sealed_in.write(_read_buffer[:nbytes])
        try:
            if not self._greeted:
                self._greet()
            while self._sealed_in.pending or self._tls.pending():
                opened = self._tls.read(len(_read_buffer), _read_buffer)
                if not opened:
                    break
                self._feed(_read_buffer[:opened])
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError:
            self._transport.abort()

    def _greet(self) -> None:
        try:
            self._tls.do_handshake()
            self._greeted = True
        finally:
            if self._sealed_out.pending:
                self._transport.write(self._sealed_out.read())


async def serve(cert_file: str, key_file: str) -> None:
    loop = asyncio.get_running_loop()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert_file, key_file)
    plain = await loop.create_server(Connection, "127.0.0.1", 0, backlog=4096)
    secure = await loop.create_server(lambda: TlsConnection(tls), "127.0.0.1", 0, backlog=4096)
    ports = {name: srv.sockets[0].getsockname()[1] for name, srv in (("http", plain), ("tls", secure))}
    print(json.dumps(ports), flush=True)
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here makes cycles that last; a collection would be lateness of our own
    parent_gone = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), parent_gone.set)
    await parent_gone.wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
