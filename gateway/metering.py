"""What one worker meters with: the ids of its requests, their keys, and where to say what they used."""

from __future__ import annotations

import itertools
import secrets
import time
from hmac import compare_digest
from typing import Any, Protocol

from billing import keys
from billing.events import Usage, UsageEvent
from gateway import headers as wire
from gateway.asgi import Memory
from gateway.endpoints import Meter
from gateway.errors import KeyBlockedError
from gateway.request_meter import RequestMeter
from gateway.tally import Tally
from gateway.usage import OutputSample

_NOBODY = ("", "")
_BEARERS = (b"bearer ", b"bearer\t")


class Estimates(Protocol):
    """Counts tokens where the upstream has not: see `gateway.estimation`."""

    async def estimate(
        self, *, meter: Meter, model: str, request_body: bytes | None, output: OutputSample, input_guess: int = 0
    ) -> Usage: ...


class Trace(Protocol):
    """Tells a collector of a request that has ended: see `proxysite.tracing`."""

    def __call__(self, event: UsageEvent, *, request_id: str, headers: wire.RawHeaders, asked_model: str) -> None: ...


class EventLog(Protocol):
    """Where usage events go, several at once or one: see `gateway.journal`."""

    def append(self, event: UsageEvent, /) -> None: ...
    def extend(self, events: list[UsageEvent], /) -> None: ...


class Metering:
    """What one worker meters with. `blocked` holds the fingerprints of blocked keys; it is replaced, not changed.

    `tally` counts what has ended; `trace`, if there is one, is told of it.
    """

    def __init__(
        self,
        *,
        pepper: bytes,
        journal: EventLog,
        estimates: Estimates,
        splices_usage: bool = True,
        logs_access: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.fingerprint = keys.Fingerprinter(pepper)
        self.append = journal.append
        self._journal = journal
        self._held_back: list[UsageEvent] = []
        self.estimates = estimates
        self.splices_usage = splices_usage
        self.logs_access = logs_access
        self.trace = trace
        self.tally = Tally()
        self.blocked: frozenset[str] = frozenset()
        self.held_bytes = 0
        self._worker = secrets.token_hex(8)
        self._numbers = itertools.count()
        # Ids are shown to clients, who need not see how many requests there are.
        self._scatter = secrets.randbits(32) | 1

    def hold_back(self) -> None:
        """Keep what is appended until `write_down`; until then no client of these requests may have its last byte."""
        self.append = self._held_back.append

    def write_down(self) -> None:
        """Append what was held back, in one write."""
        self.append = self._journal.append
        held_back, self._held_back = self._held_back, []
        if held_back:
            self._journal.extend(held_back)

    def begin(self, scope: Any) -> RequestMeter:
        """Start to meter a request. Never raises."""
        return RequestMeter(self, scope)

    def check_not_blocked(self, fingerprint: str) -> None:
        """Raise KeyBlockedError if the operator has blocked the key."""
        if fingerprint in self.blocked:
            raise KeyBlockedError("This API key has been blocked here; ask the operator of this service.")

    def new_event_id(self) -> str:
        """Return an id unique for all time, that sorts by time."""
        return f"{time.time_ns():016x}{self._worker}{next(self._numbers) * self._scatter & 0xFFFFFFFF:08x}"

    def identify(self, headers: wire.RawHeaders, memory: Memory | None = None) -> tuple[str, str]:
        """Return fingerprint and hint of the key in a request, both "" where there is none."""
        authorization = b"" if memory is None else wire.authorization_of(headers)
        if memory is not None and authorization and compare_digest(authorization, memory.authorization):
            return memory.identity
        api_key = wire.api_key_of(headers)
        if not api_key:
            return _NOBODY
        identity = self.fingerprint(api_key), keys.hint(api_key)
        if memory is not None and authorization[:7].lower() in _BEARERS:
            memory.authorization, memory.identity = authorization, identity
        return identity
