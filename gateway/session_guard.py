"""What a client's messages are held to on an open WebSocket, where the models or the money of its key are limited.

A realtime session has the model of its handshake, and money for a response is reserved for as long as it is open.
Responses over a socket (`RESPONSES_ROUTE`) say their models one by one, and money is reserved for each until it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.events import Usage
from gateway.demand import Demand, demand_of
from gateway.endpoints import Endpoint, Meter
from gateway.errors import BadRequestError, LimitsUnavailableError, ModelNotAllowedError, SpendLimitedError
from gateway.hold import grace_tokens
from gateway.usage import RESPONSE_ENDS, ClientMessage, RequestFacts, client_message
from gateway.written import tokens_in_message

if TYPE_CHECKING:
    from gateway.limiter import Limiter, SessionMeter

RESPONSES_ROUTE = "/v1/responses"
_CREATES, _STEERS = "response.create", "response.steer"
_ENDPOINT = Endpoint(RESPONSES_ROUTE, Meter.RESPONSES)
# A response that has used up its reservation asks for this part of it again.
_EXTENSION_PART = 4
_UNREADABLE = (
    "Under this API key's limits a message is a JSON object with a `type`, each of whose members, and of those of its "
    "`session` and `response`, stands there once."
)
_NO_MONEY = "This response may cost more than is left of this month's spend limit; what is in progress may free some."


class SessionGuard:
    """Looks at the messages of one session. `event_id` is the client's own name for the last one, "" if none."""

    def __init__(self, limiter: Limiter, meter: SessionMeter, *, model: str) -> None:
        self.event_id = ""
        self._limiter = limiter
        self._meter = meter
        self._is_told_later = meter.endpoint.route == RESPONSES_ROUTE
        # The models that something is reserved for, in a realtime session; the last one of responses over a socket.
        self._models = {model} if model else set()
        self._facts = RequestFacts()
        # Of the responses in progress: what was reserved for each, and for what they wrote beyond it.
        self._open: list[int] = []
        self._extra_units = 0
        self._paid_tokens = self._seen_tokens = self._largest_tokens = 0
        self._grace_tokens = 0
        # Only one response was asked for, of which the upstream has said nothing yet.
        self._is_unanswered = False

    # Client to upstream

    async def check(self, message: str | bytes) -> None:
        """Let a message go up, or raise GatewayError; what its response may cost is reserved then."""
        self.event_id = ""
        has_money = self._has_money()
        if not (has_money or self._limiter.rules.of_key(self._meter.fingerprint).models):
            return
        asked = client_message(message)
        if asked is None:
            raise BadRequestError(_UNREADABLE)
        self.event_id = asked.event_id
        self._limiter.check_models(self._meter, asked.models)
        was_quiet = not self._open
        is_request = self._is_told_later and asked.kind in (_CREATES, _STEERS)
        if is_request:
            await self._admit_response(asked, has_money=has_money)
        elif has_money and not self._is_told_later:
            await self._admit_models(asked)
        self._is_unanswered = is_request and was_quiet

    async def _admit_response(self, asked: ClientMessage, *, has_money: bool) -> None:
        if asked.kind == _CREATES:
            if len(asked.models) != 1:
                # Which of several counts is the upstream's to say; so is which one a prompt template has.
                message = "A `response.create` that is sent with this API key names one model."
                raise ModelNotAllowedError(message, param="model")
            self._facts = RequestFacts(model=asked.models[0], service_tier=asked.service_tier)
        if not has_money:
            return
        demand = demand_of(
            _ENDPOINT,
            self._facts,
            body=asked.body,
            body_bytes=len(asked.body),
            output_tokens=self._limiter.assumed_tokens(self._facts.model),
            reference_tokens=self._limiter.options.reference_tokens,
        )
        self._open.append(await self._reserve(demand, self._facts))
        self._paid_tokens += demand.output_tokens
        self._grace_tokens += grace_tokens(demand)

    async def _admit_models(self, asked: ClientMessage) -> None:
        """Reserve for a realtime session's models as the handshake has for its own."""
        for model in asked.models:
            if model not in self._models:
                await self._reserve(self._limiter.session_demand(), RequestFacts(model=model))
                self._models.add(model)

    async def _reserve(self, demand: Demand, facts: RequestFacts) -> int:
        units = self._limiter.most_units(self._meter, demand, facts)
        hold = self._meter.hold
        if hold is not None and not await hold.reserve_units(units):
            self._limiter.tally.refused("key", "spend")
            raise SpendLimitedError(_NO_MONEY)
        return units

    def _has_money(self) -> bool:
        return self._meter.hold is not None and self._meter.hold.has_money

    # Upstream to client

    async def allows(self, kind: str, message: str | bytes) -> bool:
        """Take a message of the upstream's, of which `kind` is the type; return whether the session may go on.

        "" is the type of a piece of an answer. Whatever `kind` ends has been settled before.
        """
        if not self._open:
            return True
        was_unanswered, self._is_unanswered = self._is_unanswered, False
        if kind in RESPONSE_ENDS or (kind == "error" and was_unanswered):
            await self._close_one()
        return not (kind == "" or kind.endswith(".delta")) or await self._is_paid(message)

    async def _close_one(self) -> None:
        # Responses may overlap, and nobody says which one this is: the least is given back first.
        units = min(self._open)
        self._open.remove(units)
        if not self._open:
            units += self._extra_units
            self._extra_units = 0
            self._paid_tokens = self._seen_tokens = self._largest_tokens = 0
            self._grace_tokens = 0
        if self._meter.hold is not None:
            await self._meter.hold.release_units(units)

    async def _is_paid(self, piece: str | bytes) -> bool:
        """Return whether a piece of an answer, and another one like the largest, are paid for: if need be now."""
        limiter, hold = self._limiter, self._meter.hold
        if hold is None or not limiter.options.cuts:
            return True
        tokens = tokens_in_message(piece.encode() if isinstance(piece, str) else piece)
        self._seen_tokens += tokens
        self._largest_tokens = max(self._largest_tokens, tokens)
        missing = self._seen_tokens + self._largest_tokens - self._paid_tokens
        if missing <= 0 or (self._grace_tokens and self._seen_tokens <= self._paid_tokens + self._grace_tokens):
            return True
        self._grace_tokens = 0
        # Less will do, as long as it is enough for the next piece.
        for more in (missing + max(limiter.options.output_tokens // _EXTENSION_PART, 1), missing):
            units = self._units_of(more)
            try:
                is_there = await hold.reserve_units(units)
            except LimitsUnavailableError as error:
                hold.cut_for = error
                return False
            if is_there:
                self._extra_units += units
                self._paid_tokens += more
                return True
        limiter.tally.refused("key", "cut")
        return False

    def _units_of(self, output_tokens: int) -> int:
        limiter, facts = self._limiter, self._facts
        factor = limiter.rules.factor_of(self._meter.fingerprint)
        usage = Usage(output_tokens=output_tokens)
        return limiter.prices.most(facts.model, usage, service_tier=facts.service_tier, factor=factor) or 0
