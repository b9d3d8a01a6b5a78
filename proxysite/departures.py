"""Clients that leave while nothing is read from them: the event loop looks at no connection whose reading is paused."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


class Departures:
    """Calls back when the client of a watched connection closes or resets it, once, whether it is being read or not.

    One descriptor for all of a worker's connections, made when the first is watched. A client that has closed behind
    more than this machine has taken in cannot be seen to have left.
    """

    _epoll: select.epoll | None = None

    def __init__(self) -> None:
        self._watched: dict[int, Callable[[], None]] = {}

    def watch(self, transport: asyncio.Transport, on_departure: Callable[[], None]) -> int:
        """Watch a connection until it ends; return what `forget` is to be told then, -1 if it has ended already."""
        epoll = self._epoll
        if epoll is None:
            epoll = self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(epoll.fileno(), self._look)
        descriptor: int = transport.get_extra_info("socket").fileno()
        if descriptor < 0:
            return -1
        self._watched[descriptor] = on_departure
        # A reset shows without being asked for. Edges only: what was told shall not be told again in every turn.
        wanted = select.EPOLLRDHUP | select.EPOLLET
        try:
            epoll.register(descriptor, wanted)
        except FileExistsError:
            epoll.modify(descriptor, wanted)
        return descriptor

    def forget(self, descriptor: int, on_departure: Callable[[], None]) -> None:
        """Drop what was watched; the kernel has done so with the socket, whose number may be another's by now."""
        if self._watched.get(descriptor) == on_departure:
            del self._watched[descriptor]

    def _look(self) -> None:
        assert self._epoll is not None  # noqa: S101 - this is its reader
        for descriptor, _ in self._epoll.poll(0):
            on_departure = self._watched.get(descriptor)
            if on_departure is not None:
                on_departure()


departures = Departures()


class WatchedFlow(FlowControl):
    """uvicorn's flow control of a connection, which is aborted when its client leaves while it is not read from.

    From its first pause on, each connection is watched. `is_held` keeps reading paused, whoever would resume it.
    """

    is_held = False
    _descriptor = -1
    _has_left = False

    def pause_reading(self) -> None:
        if self.read_paused:
            return
        super().pause_reading()
        if self._descriptor < 0:
            self._descriptor = departures.watch(self._transport, self._client_left)
        if self._has_left:
            self._transport.abort()

    def resume_reading(self) -> None:
        if self.read_paused and not self.is_held:
            super().resume_reading()

    def forget(self) -> None:
        """The connection has ended."""
        if self._descriptor >= 0:
            departures.forget(self._descriptor, self._client_left)

    def _client_left(self) -> None:
        # Where it is read from, its end will be read, behind what it has sent.
        self._has_left = True
        if self.read_paused:
            self._transport.abort()
