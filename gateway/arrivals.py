"""Answers that have come whole: those of one turn of the loop are metered in a row, and written down in one piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.exchange import Exchange
    from gateway.relay import Relay

# With so many exchanges or fewer, an answer goes out in the callback that has read its end: others are not likely.
_FEW = 4


class Arrivals:
    """No client has its last byte before its event is on disk; many have theirs for one write to the journal.

    What is done for several answers in a row also finds code and data in the processor's caches, where otherwise each
    answer's accounting would be followed by somebody's request that goes up.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._waiting: list[Exchange] = []

    def add(self, exchange: Exchange) -> None:
        """Have the exchange answered, at the latest when everything that can be read now has been read."""
        waiting = self._waiting
        waiting.append(exchange)
        if len(self._relay.exchanges) <= _FEW:
            self._answer()
        elif len(waiting) == 1:
            loop = self._relay.loop or self._relay.find_loop()
            loop.call_soon(self._answer)

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        metering = self._relay.metering
        metering.hold_back()
        try:
            taken = [exchange for exchange in waiting if exchange.take_answer()]
        finally:
            metering.write_down()
        for exchange in taken:
            exchange.send_answer()
