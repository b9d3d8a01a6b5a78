"""What a caller of /pro/chat/completions gets: the envelope of /pro, whole or as server-sent events."""

from __future__ import annotations

from typing import Any

from django.utils.translation.trans_real import parse_accept_lang_header

from gateway import headers as wire
from gateway.asgi import Scope, Send
from gateway.errors import ResponseCutError
from proxysite.envelope import SUCCESS, Message, ProError, encode_json
from sessions_api.answers import RefusedError

# RFC 9745: since when, in seconds since the epoch: it came as one that has a successor. RFC 8288 names that.
_DEPRECATED = [
    (b"deprecation", b"@1795305600"),
    (b"link", b'</v1/chat/completions>; rel="successor-version"'),
]
_COMMON: wire.RawHeaders = [*_DEPRECATED, (b"cache-control", b"no-store"), *wire.CORS_HEADERS]


class Reply:
    """The answer to one request; `send` is the server's."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send = send
        self._is_english = _prefers_english(scope["headers"])
        self._is_stream = False

    async def allow(self, request_headers: wire.RawHeaders) -> None:
        """Answer a CORS preflight."""
        headers = [*wire.preflight(request_headers), *_DEPRECATED]
        await self._send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body"})

    async def succeed(self, text: str, headers: wire.RawHeaders) -> None:
        """Send the whole answer."""
        await self._whole(200, SUCCESS, text, headers)

    async def piece(self, text: str, headers: wire.RawHeaders) -> None:
        """Send a piece of a streamed answer, the head with the first one."""
        if not self._is_stream:
            await self._start_stream(headers)
        await self._event(b"", 200, SUCCESS, text)

    async def done(self, headers: wire.RawHeaders) -> None:
        """Send the last event of a streamed answer: `event: done`, no data in its envelope."""
        if not self._is_stream:
            await self._start_stream(headers)
        await self._event(b"event: done\n", 200, SUCCESS, None)
        await self._send({"type": "http.response.body"})

    async def fail(self, error: ProError) -> None:
        """Send an error; inside a stream `event: error`, after which the connection is dropped.

        Raises ResponseCutError in that case: a failure does not end as an answer does.
        """
        if self._is_stream:
            await self._event(b"event: error\n", error.status, error.message, None)
            raise ResponseCutError(error.message.en)
        headers: wire.RawHeaders = list(error.headers) if isinstance(error, RefusedError) else []
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after_s))
        if error.status == 405:
            headers.append((b"allow", b"POST, OPTIONS"))
        await self._whole(error.status, error.message, None, headers)

    async def _whole(self, status: int, message: Message, data: str | None, headers: wire.RawHeaders) -> None:
        body = self._envelope(status, message, data)
        head = [
            (b"content-type", b"application/json; charset=utf-8"),
            (b"content-length", b"%d" % len(body)),
            *_COMMON,
            *headers,
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def _start_stream(self, headers: wire.RawHeaders) -> None:
        self._is_stream = True
        head = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-accel-buffering", b"no"),
            *_COMMON,
            *headers,
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})

    async def _event(self, kind: bytes, status: int, message: Message, data: str | None) -> None:
        event = kind + b"data: " + self._envelope(status, message, data) + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    def _envelope(self, status: int, message: Message, data: Any) -> bytes:
        text = message.en if self._is_english else message.zh
        return encode_json({"code": status, "message": text, "data": data})


def _prefers_english(headers: wire.RawHeaders) -> bool:
    """Return whether English is asked for before Chinese; Chinese is for whoever asks for neither."""
    accepted = b", ".join(value for name, value in headers if name == b"accept-language").decode("latin-1")
    for language, _ in parse_accept_lang_header(accepted.lower()):
        if language.startswith(("en", "zh")):
            return language.startswith("en")
    return False
