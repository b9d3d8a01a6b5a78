"""Requests as bytes and as fields: where one ends, and what is left of one that offered an upgrade."""

from __future__ import annotations

import contextlib

import httptools


class _Counter:
    messages = 0

    def on_message_complete(self) -> None:
        self.messages += 1


def end_of_messages(data: bytes, count: int) -> int:
    """Return where the first so many messages in `data` end, which httptools tells nobody: by halving, so seldom."""
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        counter = _Counter()
        with contextlib.suppress(httptools.HttpParserError):
            httptools.HttpRequestParser(counter).feed_data(data[:middle])
        if counter.messages >= count:
            high = middle
        else:
            low = middle + 1
    return low


def without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return a request's fields as if it had not offered to upgrade; what else `Connection` says stays."""
    kept = []
    for name, value in headers:
        if name == b"connection":
            options = [option for option in value.split(b",") if option.strip().lower() != b"upgrade"]
            if options:
                kept.append((name, b",".join(options)))
        elif name != b"upgrade":
            kept.append((name, value))
    return kept
