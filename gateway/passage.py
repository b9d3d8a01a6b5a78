"""The body of an answer on its way to its client, in pieces as they come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gateway import headers as wire
from gateway.answer import Answer
from gateway.asgi import Send, Shortcuts
from gateway.decoding import Decoder, unpacked
from gateway.request_meter import RequestMeter
from gateway.sse import EventAligner

if TYPE_CHECKING:
    from gateway.exchange import Exchange


class Passage:
    """Passes on what `stream` yields, behind a head that has been sent, and has the exchange metered before its end.

    An event stream leaves by whole events, and without what only this gateway has asked for. A client may take as long
    as it likes: only the upstream's silence is timed, by the exchange's `deadline`.
    """

    def __init__(
        self,
        exchange: Exchange,
        stream: Any,
        answer: wire.ToClient,
        decoder: Decoder | None,
        *,
        meter: RequestMeter,
        send: Send,
        shortcuts: Shortcuts | None,
    ) -> None:
        self._exchange = exchange
        self._stream = stream
        self._answer = answer
        self._decoder = decoder
        self._meter = meter
        self._send = send
        self._shortcuts = shortcuts
        self._now = exchange.loop.time
        self._silence_timeout_s = exchange.limits.silence_timeout_s
        self._aligner = EventAligner(exchange.limits.sse_event_max_bytes) if answer.is_event_stream else None
        self._left_events = b""  # metered already, and yet to be sent

    async def run(self) -> None:
        """Return when all of it has been sent. Raises whatever the stream raises, ClientLeftError."""
        self._exchange.wait_for_upstream(self._silence_timeout_s)
        if self._aligner is None:
            await self._pass_chunks()
        else:
            await self._pass_events(self._aligner)

    def rest(self) -> bytes | None:
        """Return what is held of an event stream that is cut, with the end of its last event; None of anything else."""
        if self._aligner is None:
            return None
        end = b"\n\n" if self._aligner.is_inside_event else b""
        return self._meter.without_usage(self._left_events) + self._aligner.flush() + end

    async def _pass_events(self, aligner: EventAligner) -> None:
        exchange, send, meter = self._exchange, self._send, self._meter
        watched = meter.hold if meter.hold is not None and meter.hold.watches else None
        stream = self._stream if self._decoder is None else unpacked(self._stream, self._decoder)
        if isinstance(stream, Answer) and self._shortcuts is not None and watched is None:
            stream.on_piece = self._pass_now
        async for chunk in stream:
            meter.feed(chunk)
            exchange.check_drain()
            events = aligner.feed(chunk)
            if watched is not None and events and watched.needs_more(events):
                await watched.extend()
            if self._left_events:
                events, self._left_events = self._left_events + events, b""
            if events:
                if meter.may_be_last(events):
                    await exchange.finish()
                events = meter.without_usage(events)
                exchange.deadline = math.inf
                await send({"type": "http.response.body", "body": events, "more_body": True})
            exchange.deadline = self._now() + self._silence_timeout_s
        exchange.deadline = math.inf
        await exchange.finish()
        rest = aligner.flush()
        await send({"type": "http.response.body", "body": meter.without_usage(rest) if rest else b""})

    def _pass_now(self, chunk: bytes) -> bool:
        """Pass a piece of an event stream on in the turn in which it came; return whether that could be done.

        What has to be waited for is left to the task: a client that does not read, or has left, and the end.
        """
        shortcuts, aligner, meter = self._shortcuts, self._aligner, self._meter
        if shortcuts is None or aligner is None or self._exchange.has_lost_client or shortcuts.is_clogged():
            return False
        meter.feed(chunk)
        events = aligner.feed(chunk)
        if events:
            if meter.may_be_last(events):
                self._left_events = events
                self._stream.nudge()
                return True
            events = meter.without_usage(events)
            if events:
                shortcuts.send_part(events)
        self._exchange.deadline = self._now() + self._silence_timeout_s
        return True

    async def _pass_chunks(self) -> None:
        exchange, send, meter = self._exchange, self._send, self._meter
        body_bytes, is_packed = self._answer.body_bytes, bool(self._answer.content_encoding)
        is_told = is_sent = False
        async for chunk in self._stream:
            meter.feed(chunk)
            exchange.check_drain()
            exchange.deadline = math.inf
            body_bytes -= len(chunk)
            is_sent = body_bytes == 0
            # Of packed events the client may see the last before the last byte.
            if is_sent or (is_packed and not is_told and meter.has_ended()):
                await exchange.finish()
                is_told = True
            await send({"type": "http.response.body", "body": chunk, "more_body": not is_sent})
            if is_sent and getattr(self._stream, "ended", False):
                break
            exchange.deadline = self._now() + self._silence_timeout_s
        exchange.deadline = math.inf
        if not is_sent:
            await exchange.finish()
            await send({"type": "http.response.body"})
