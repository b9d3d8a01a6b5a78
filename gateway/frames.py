"""What both ends of a WebSocket share: whole messages from frames, and who is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from websockets.frames import Frame, Opcode

# Bytes waiting for a slow reader above which the peer is no longer read.
WAITING_BYTES = 262_144
# What a waiting message costs beside its bytes: many empty ones are much, too.
MESSAGE_OVERHEAD_BYTES = 256
# How a close frame without a code is spoken of (RFC 6455 §7.4.1).
NO_CODE = 1005


class Keepalive:
    """Pings a peer at an interval; gives it up when a whole one brought nothing, not even the pong.

    A peer that is held up, in either direction, is not judged: its pong may stand unread behind a message,
    our ping unsent. Set `heard` on every byte received, and when a hold-up ends.
    """

    def __init__(
        self,
        interval_s: float,
        *,
        ping: Callable[[], None],
        give_up: Callable[[], None],
        is_held_up: Callable[[], bool],
    ) -> None:
        self.heard = True
        self._interval_s = interval_s
        self._ping = ping
        self._give_up = give_up
        self._is_held_up = is_held_up
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._tick)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        if not self._is_held_up():
            if not self.heard:
                self._give_up()
                return
            self.heard = False
            self._ping()
        self.start()


class Assembler:
    """Data frames in, whole messages out; frames of no bytes cost nothing, however many."""

    def __init__(self) -> None:
        self._parts = bytearray()
        self._is_text = False

    def feed(self, frame: Frame) -> str | bytes | None:
        """Return the message that the frame completes. UnicodeDecodeError where text is not UTF-8."""
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        data: Any = frame.data
        if self._parts or not frame.fin:
            self._parts += data
            if not frame.fin:
                return None
            data, self._parts = self._parts, bytearray()
        return data.decode() if self._is_text else bytes(data)
