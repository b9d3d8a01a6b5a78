"""May this request go upstream? Asked before it does; what it has used is counted when it ends.

Nothing here is reached while no limit is set: see `Relay.limiter`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Protocol

from billing.events import Usage, UsageEvent
from gateway.addresses import ProxyTrust
from gateway.demand import FREE, MODEL_FIELD_MOST_BYTES, Demand, demand_of, model_fields, thinks_unseen
from gateway.endpoints import Endpoint, Meter
from gateway.errors import (
    AddressNotAllowedError,
    BodyTooLargeError,
    GatewayError,
    KeyNotRegisteredError,
    LimitsUnavailableError,
    ModelNotAllowedError,
    ModelUnpricedError,
)
from gateway.hold import Hold
from gateway.limit_errors import error_of
from gateway.limit_memory import MemoryStore
from gateway.limit_redis import LimitsAwayError, RedisStore
from gateway.limits import (
    Address,
    Ask,
    Limits,
    Refusal,
    Rules,
    counted_address,
    month_of,
)
from gateway.seen_request import SeenRequest
from gateway.tally import Tally
from gateway.usage.facts import RequestFacts

logger = logging.getLogger("gateway.limits")

# An unstated output takes at most this part of a minute's tokens; what it uses beyond that is counted at its end.
_UNSTATED_PART = 8
_MOST_RECENT = 5_000
_USED_MODELS = frozenset(
    {
        Meter.CHAT,
        Meter.COMPLETIONS,
        Meter.RESPONSES,
        Meter.EMBEDDINGS,
        Meter.IMAGES,
        Meter.TRANSCRIPTION,
        Meter.TRANSLATION,
        Meter.SPEECH,
        Meter.RUNS,
        Meter.OTHER,
        Meter.REALTIME,
    }
)
# A POST below these uses no model. Whatever else is posted must say which one, where not all are allowed.
_WITHOUT_MODEL = (
    "/v1/files",
    "/v1/uploads",
    "/v1/vector_stores",
    "/v1/containers",
    "/v1/conversations",
    "/v1/threads/{thread_id}/messages",
)
_ENDS_WITHOUT_MODEL = ("/cancel", "/pause")


_TOO_LARGE = "Under this API key's limits JSON has at most 4 MiB, so that its model is seen before it is passed on."


class Prices(Protocol):
    """What things cost, in tenths of a micro-dollar: see `billing.reserving.Prices`."""

    def most(self, model: str, usage: Usage, *, service_tier: str, factor: Decimal) -> int | None:
        """Return the most that it may cost, None where nobody knows."""

    def cost(self, event: UsageEvent, *, factor: Decimal) -> int | None:
        """Return what it did cost, None where nobody knows."""


class Meters(Protocol):
    """What is known of a request, or of a session."""

    hold: Hold | None

    @property
    def request_id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


class SessionMeter(Meters, Protocol):
    """See `gateway.session_meter.SessionMeter`."""

    endpoint: Endpoint


class RequestMeter(Meters, Protocol):
    """See `gateway.request_meter.RequestMeter`."""

    method: str
    endpoint: Endpoint
    seen: SeenRequest


@dataclass(frozen=True, slots=True)
class LimiterOptions:
    """`refuses_when_away`: nothing passes that cannot be counted. `cuts`: a stream ends where its money does."""

    refuses_when_away: bool = False
    cuts: bool = True
    output_tokens: int = 16_384
    reasoning_tokens: int = 128_000
    reference_tokens: int = 50_000
    always_registered: frozenset[str] = frozenset()


class Limiter:
    """The one door of a worker to all limits. `rules` is replaced as a whole, from whichever thread read them."""

    def __init__(
        self,
        *,
        store: MemoryStore | RedisStore,
        prices: Prices,
        trust: ProxyTrust,
        fingerprint: Callable[[bytes], str],
        tally: Tally,
        options: LimiterOptions,
    ) -> None:
        self.rules = Rules()
        self.store = store
        self.prices = prices
        self.options = options
        self._trust = trust
        self._fingerprint = fingerprint
        self.tally = tally
        self._recent: set[str] = set()
        self._uploads: Counter[tuple[str, str]] = Counter()

    @property
    def is_away(self) -> bool:
        """Whether limits cannot be counted now."""
        return isinstance(self.store, RedisStore) and self.store.is_away

    def take_recent(self) -> set[str]:
        """Return the fingerprints of keys with a limit of money that were used since the last call; of many, some."""
        recent, self._recent = self._recent, set()
        return recent

    # Before the body is read

    def screen(self, meter: Meters, scope: Any) -> None:
        """Refuse whoever may not come in at all. Raises GatewayError."""
        rules = self.rules
        fingerprint = meter.fingerprint
        if not self._is_registered(fingerprint):
            if not rules.is_read:
                message = "Which API keys are registered is not known yet; try again soon."
                raise self._refused("key", "unknown_key", LimitsUnavailableError(message, retry_after_s=1))
            message = "This API key is not registered here; ask the operator of this service."
            raise self._refused("key", "unknown_key", KeyNotRegisteredError(message))
        limits = rules.of_key(fingerprint)
        if limits.networks and not limits.allows_address(self._trust.client_of(scope)):
            error = AddressNotAllowedError("This API key may not be used from your network address.")
            raise self._refused("key", "network", error)

    def _is_registered(self, fingerprint: str) -> bool:
        registered = self.rules.registered
        return registered is None or fingerprint in registered or fingerprint in self.options.always_registered

    def screen_request(self, meter: RequestMeter, scope: Any) -> None:
        """The same of an HTTP request, which is told what of its body must be seen before any of it goes upstream."""
        self.screen(meter, scope)
        seen, limits = meter.seen, self.rules.of_key(meter.fingerprint)
        if limits.models:
            seen.must_be_seen = meter.method == "POST" and not _uses_no_model(meter.endpoint)
            if seen.must_be_seen:
                seen.form_guard = FormGuard()
        elif limits.monthly_units or self.rules.address.monthly_units:
            seen.must_be_seen = meter.endpoint.meter in _USED_MODELS

    @contextlib.contextmanager
    def uploading(self, meter: Meters, scope: Any) -> Iterator[None]:
        """Wait for a body within; raises GatewayError where too many are waited for.

        A request is counted by `admit` when its body is here: until then this worker alone holds its key and its
        address to the number that each may have at once, so that none fills the worker with bodies that never end.
        """
        rules = self.rules
        asks = []
        if (limits := rules.of_key(meter.fingerprint)).concurrent_streams:
            asks.append(Ask("key", meter.fingerprint, limits))
        if rules.address.concurrent_streams:
            asks.append(Ask("address", counted_address(self._trust.client_of(scope)), rules.address))
        for ask in asks:
            most = ask.limits.concurrent_streams
            if self._uploads[ask.scope, ask.name] >= most:
                refusal = Refusal(ask.scope, "streams", most, 0, 1.0)
                raise self._refused(ask.scope, "streams", error_of(refusal, time.time()))
        names = [(ask.scope, ask.name) for ask in asks]
        self._uploads.update(names)
        try:
            yield
        finally:
            self._uploads.subtract(names)
            for name in names:
                if not self._uploads[name]:
                    del self._uploads[name]

    # Before the request goes upstream

    async def admit(self, meter: RequestMeter, scope: Any) -> None:
        """Let a request pass, or raise GatewayError; what it takes is held by `meter.hold` until it ends."""
        limits = self.rules.of_key(meter.fingerprint)
        endpoint, seen, body = meter.endpoint, meter.seen, meter.seen.beginning
        facts = seen.known_facts()
        if seen.must_be_seen and seen.is_too_large(scope["headers"]):
            raise BodyTooLargeError(_TOO_LARGE)
        if seen.form_guard is not None:
            self._check_model(limits, facts.model)
        demand = FREE
        if self._weighs(limits) and (endpoint.meter in _USED_MODELS or endpoint.has_untold_cost):
            demand = demand_of(
                endpoint,
                facts,
                body=body,
                body_bytes=seen.likely_bytes(scope["headers"]),
                output_tokens=self.assumed_tokens(facts.model),
                reference_tokens=self.options.reference_tokens,
            )
        await self._admit(meter, scope, limits, demand, facts, is_stream=facts.is_stream)

    async def admit_session(
        self, meter: SessionMeter, scope: Any, *, model: str | None, is_told_later: bool = False
    ) -> None:
        """Let a WebSocket pass, or raise GatewayError. `model` is None where the handshake names none.

        `is_told_later`: each response says its model when it is asked for; see `gateway.session_guard`.
        """
        limits = self.rules.of_key(meter.fingerprint)
        if limits.models and not (is_told_later and model is None):
            self._check_model(limits, model or "")
        demand = Demand() if is_told_later else self.session_demand()
        await self._admit(meter, scope, limits, demand, RequestFacts(model=model or ""), is_stream=False)

    def session_demand(self) -> Demand:
        """Return what is reserved for a realtime session: a response, of which nothing is known before."""
        return demand_of(
            Endpoint("", Meter.REALTIME),
            RequestFacts(),
            body=None,
            body_bytes=0,
            output_tokens=self.options.output_tokens,
            reference_tokens=0,
        )

    # Within a session

    def check_models(self, meter: SessionMeter, models: tuple[str, ...]) -> None:
        """Raise ModelNotAllowedError unless the key may use all of them."""
        limits = self.rules.of_key(meter.fingerprint)
        for model in models:
            self._check_model(limits, model)

    def most_units(self, meter: SessionMeter, demand: Demand, facts: RequestFacts) -> int:
        """Return the most that a response may cost. Raises ModelUnpricedError where nobody knows."""
        return self._most_units(demand, facts, self.rules.factor_of(meter.fingerprint))

    def _weighs(self, limits: Limits) -> bool:
        """Return whether it matters how much a request may use."""
        address = self.rules.address
        return bool(
            limits.tokens_per_minute or limits.monthly_units or address.tokens_per_minute or address.monthly_units
        )

    def assumed_tokens(self, model: str) -> int:
        """Return what an answer is taken to have at most where its request does not say so."""
        options = self.options
        return max(options.output_tokens, options.reasoning_tokens if thinks_unseen(model) else 0)

    def _check_model(self, limits: Limits, model: str) -> None:
        if model and limits.allows_model(model):
            return
        said = f"use the model `{model}`" if model else "make this request, which does not say which model it is for"
        error = ModelNotAllowedError(f"This API key may not {said}.", param="model")
        raise self._refused("key", "model", error)

    async def _admit(
        self, meter: Meters, scope: Any, limits: Limits, demand: Demand, facts: RequestFacts, *, is_stream: bool
    ) -> None:
        rules, now = self.rules, time.time()
        month = month_of(now)
        factor = rules.factor_of(meter.fingerprint)
        units = 0
        if not demand.is_free and (limits.monthly_units or rules.address.monthly_units):
            units = self._most_units(demand, facts, factor)
        asks = []
        if limits.counts:
            spent = 0
            if limits.monthly_units:
                spent = rules.spent_by(meter.fingerprint, month)
                if len(self._recent) < _MOST_RECENT:
                    self._recent.add(meter.fingerprint)
            asks.append(_ask("key", f"k:{meter.fingerprint}", limits, demand, units, spent))
        if rules.address.counts:
            address = self._trust.client_of(scope)
            asks.append(_ask("address", f"a:{self._named(address)}", rules.address, demand, units, 0))
        if not asks:
            return
        try:
            refusal = await self.store.admit(meter.request_id, asks, month=month, now=time.monotonic())
        except LimitsAwayError as exc:
            self.tally.uncounted()
            if self.options.refuses_when_away:
                if exc.was_asked and isinstance(self.store, RedisStore):
                    self.store.disown(meter.request_id, asks, month=month)
                message = "Limits cannot be checked now; try again soon."
                error = LimitsUnavailableError(message, retry_after_s=1)
                raise self._refused("key", "limits_away", error) from exc
            asks = [ask._replace(tokens=0, units=0) for ask in asks]
            refusal = None
        if refusal is not None:
            raise self._refused(refusal.scope, refusal.reason, error_of(refusal, now))
        has_money = any(ask.limits.monthly_units for ask in asks)
        meter.hold = Hold(
            self,
            meter.request_id,
            asks,
            month=month,
            factor=factor,
            units=units if has_money else 0,
            demand=demand,
            model=facts.model,
            service_tier=facts.service_tier,
            watches=self.options.cuts and is_stream and has_money and units > 0,
        )

    def _most_units(self, demand: Demand, facts: RequestFacts, factor: Decimal) -> int:
        if demand.most == Usage():
            return 1
        model, tier = facts.model, facts.service_tier
        units = self.prices.most(model, demand.most, service_tier=tier, factor=factor) if model else None
        if units is None:
            what = f"the price of the model `{model}` is not known" if model else "it does not say its model"
            message = f"This request cannot be checked against a spend limit: {what}."
            raise self._refused("key", "unpriced", ModelUnpricedError(message, param="model"))
        return max(units, 1)

    def _named(self, address: Address | None) -> str:
        """Return what stands for an address in the counts: they hold no client's address."""
        return self._fingerprint(b"address " + counted_address(address).encode())[:32]

    def _refused(self, scope: str, reason: str, error: GatewayError) -> GatewayError:
        self.tally.refused(scope, reason)
        return error


def _uses_no_model(endpoint: Endpoint) -> bool:
    route = endpoint.route
    return route.startswith(_WITHOUT_MODEL) or route.endswith(_ENDS_WITHOUT_MODEL) or route == "/v1/threads"


def _ask(scope: Any, name: str, limits: Limits, demand: Demand, units: int, spent_units: int) -> Ask:
    tokens = 0
    if limit := limits.tokens_per_minute:
        if demand.is_stated:
            tokens = demand.prompt_tokens + demand.output_tokens
        else:
            tokens = min(demand.prompt_tokens + min(demand.output_tokens, limit // _UNSTATED_PART), limit)
    return Ask(scope, name, limits, tokens, units if limits.monthly_units else 0, spent_units)


class FormGuard:
    """Looks at a form on its way up, where a key may use some models only: it may name one, once.

    Which of several counts is the upstream's to say.
    """

    def __init__(self) -> None:
        self._found = 0
        self._rest = b""

    def feed(self, part: bytes) -> None:
        """Take the next part. Raises ModelNotAllowedError."""
        seen = self._rest + part
        self._rest = seen[-MODEL_FIELD_MOST_BYTES:]
        # What stands whole in the rest is counted with the next part, or at no time: then it was the only one.
        self._found += model_fields(seen) - model_fields(self._rest)
        if self._found + model_fields(self._rest) > 1:
            raise ModelNotAllowedError("A form that is sent with this API key names one model.", param="model")
