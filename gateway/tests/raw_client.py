"""A client of single bytes: sends what no HTTP library would, and shows what really came back."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from gateway.tests.live import LiveProxy


@dataclass
class RawAnswer:
    """`end` tells how the answer ended: "whole" by its own framing, "closed" or "reset" before that."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    end: str
    raw: bytes

    def value(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class RawClient:
    """One connection to the proxy."""

    def __init__(self, proxy: LiveProxy, timeout_s: float = 60.0) -> None:
        self.socket = proxy.connect(timeout_s)
        self._data = b""
        self._ended = ""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def get(self, target: str = "/v1/models", *headers: str) -> None:
        self.request("GET", target, *headers)

    def request(self, method: str, target: str, *headers: str, body: bytes | None = None) -> None:
        lines = [f"{method} {target} HTTP/1.1", "Host: proxy.example", *headers]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b""))

    def _more(self) -> bool:
        if self._ended:
            return False
        try:
            data = self.socket.recv(65536)
        except ConnectionError:
            self._ended = "reset"
            return False
        if not data:
            self._ended = "closed"
        self._data += data
        return bool(data)

    def read_until(self, mark: bytes) -> bytes:
        """Return everything up to and with `mark`, and keep what follows."""
        while mark not in self._data:
            if not self._more():
                raise AssertionError(f"{mark!r} never came, but {self._data!r}")
        end = self._data.index(mark) + len(mark)
        found, self._data = self._data[:end], self._data[end:]
        return found

    def read_to_end(self) -> bytes:
        """Return everything until the proxy closes the connection."""
        while self._more():
            pass
        found, self._data = self._data, b""
        return found

    def read_exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            if not self._more():
                raise AssertionError(f"only {self._data!r} came")
        found, self._data = self._data[:size], self._data[size:]
        return found

    def answer(self, *, to_head: bool = False) -> RawAnswer:
        """Read one answer by its framing, or as far as it came."""
        head = self.read_until(b"\r\n\r\n")
        while head.split(b" ", 2)[1].startswith(b"1"):
            head = self.read_until(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines[1:-2])]
        answer = RawAnswer(int(lines[0].split(" ")[1]), headers, b"", "whole", head)
        length = answer.value("content-length")
        if to_head or answer.status in (204, 304):
            pass
        elif answer.value("transfer-encoding") == "chunked":
            self._read_chunks(answer)
        elif length is not None:
            self._read_length(answer, int(length))
        else:
            answer.body = self.read_to_end()
            answer.end = self._ended
        return answer

    def _read_length(self, answer: RawAnswer, length: int) -> None:
        while len(self._data) < length and self._more():
            pass
        answer.body, self._data = self._data[:length], self._data[length:]
        if len(answer.body) < length:
            answer.end = self._ended

    def _read_chunks(self, answer: RawAnswer) -> None:
        try:
            while size := int(self.read_until(b"\r\n"), 16):
                answer.body += self.read_exactly(size)
                self.read_exactly(2)
            while (line := self.read_until(b"\r\n")) != b"\r\n":
                name, _, value = line[:-2].decode("latin-1").partition(": ")
                answer.headers.append((name, value))
        except AssertionError:
            answer.body += self._data
            answer.end = self._ended

    def reset(self) -> None:
        """Leave with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()
