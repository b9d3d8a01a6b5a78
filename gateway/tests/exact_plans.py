"""Thousands of planned requests whose every token and cent is known: to which model, how, and how each of them ends."""

from __future__ import annotations

import enum
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

WORD = " the"  # one token in every vocabulary, and four bytes, which is what a guess takes for one
CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS = "chat/completions", "completions", "responses", "embeddings"
_TENTH_OF_A_MICRO_DOLLAR = Decimal("0.0000001")


class Buckets(NamedTuple):
    """What one request used, in the ledger's disjoint buckets; `reasoning` is a part of `output`."""

    input: int = 0
    cached_input: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0


COLUMNS = ", ".join(f"{name}_tokens" for name in Buckets._fields)


class Fate(enum.Enum):
    """How a request ends; `CLIENT_…` hangs up, `UPSTREAM_…` drops the line."""

    WHOLE = "whole"
    REFUSED = "refused with 429"
    WRONG_KEY = "refused with 401"
    CLIENT_BEFORE_HEAD = "client, before the first byte"
    CLIENT_MIDWAY = "client, midway"
    CLIENT_AFTER_USAGE = "client, after the usage"
    UPSTREAM_BEFORE_HEAD = "upstream, before the head"
    UPSTREAM_MIDWAY = "upstream, midway"
    UPSTREAM_AFTER_USAGE = "upstream, after the usage"

    @property
    def has_no_head(self) -> bool:
        return self in (Fate.CLIENT_BEFORE_HEAD, Fate.UPSTREAM_BEFORE_HEAD)

    @property
    def is_midway(self) -> bool:
        return self in (Fate.CLIENT_MIDWAY, Fate.UPSTREAM_MIDWAY)

    @property
    def is_after_usage(self) -> bool:
        return self in (Fate.CLIENT_AFTER_USAGE, Fate.UPSTREAM_AFTER_USAGE)


_HANG_UPS = (Fate.CLIENT_BEFORE_HEAD, Fate.CLIENT_MIDWAY, Fate.CLIENT_MIDWAY, Fate.CLIENT_AFTER_USAGE)
_CUTS = (Fate.UPSTREAM_BEFORE_HEAD, Fate.UPSTREAM_MIDWAY, Fate.UPSTREAM_MIDWAY, Fate.UPSTREAM_AFTER_USAGE)


def _usd(**rates: str) -> dict[str, Decimal]:
    return {name: Decimal(rate) for name, rate in rates.items()}


@dataclass(frozen=True)
class Model:
    """A model, the name it answers under, and its price in USD per million tokens, as published or as our row says.

    A bucket without a rate is billed as input; `rates` of None is a model without a price. A tier has rates of its
    own, or multiplies.
    """

    name: str
    answers_as: str
    rates: dict[str, Decimal] | None
    routes: tuple[str, ...] = (CHAT,)
    used: tuple[str, ...] = ("cached_input",)
    tiers: dict[str, dict[str, Decimal] | Decimal] = field(default_factory=dict)
    per_request: Decimal = Decimal(0)
    row: str = ""  # the name of its ModelPrice row; "" is on the list

    def cost(self, buckets: Buckets, *, tier: str, factor: Decimal, is_served: bool) -> Decimal | None:
        """Return the cost in USD, rounded as a record is; None if it has no price."""
        if self.rates is None:
            return None
        rates, multiplier = self.rates, factor
        tiered = self.tiers.get(tier)
        if isinstance(tiered, Decimal):
            multiplier *= tiered
        elif tiered:
            rates = tiered
        tokens = [(name, count) for name, count in buckets._asdict().items() if name != "reasoning" and count]
        amount = sum((rates.get(name, rates["input"]) * count for name, count in tokens), Decimal(0)) / 1_000_000
        amount += self.per_request * is_served
        return (amount * multiplier).quantize(_TENTH_OF_A_MICRO_DOLLAR, ROUND_HALF_UP)


_HOUSE = _usd(input="1.2345678", cached_input="0.3333333", cache_write="1.5432101", output="7.7777777")
_HOUSE_TIERS: dict[str, dict[str, Decimal] | Decimal] = {"priority": Decimal("1.75"), "flex": Decimal("0.55")}
HEADLESS = Model("house-headless", "", _usd(input="0.9876543", output="3.1415926"), row="house-headless-*")
MODELS = (
    Model("gpt-4o-mini", "gpt-4o-mini-2024-07-18", _usd(input="0.15", cached_input="0.075", output="0.60")),
    Model("gpt-4o-2024-08-06", "gpt-4o-2024-08-06", _usd(input="2.50", cached_input="1.25", output="10")),
    Model(
        "o4-mini",
        "o4-mini-2025-04-16",
        _usd(input="1.10", cached_input="0.275", output="4.40"),
        routes=(CHAT, RESPONSES),
        used=("cached_input", "reasoning"),
    ),
    Model(
        "gpt-5",
        "gpt-5-2025-08-07",
        _usd(input="1.25", cached_input="0.125", output="10"),
        routes=(CHAT, RESPONSES),
        used=("cached_input", "reasoning"),
        tiers={"priority": _usd(input="2.50", cached_input="0.25", output="20")},
    ),
    Model("gpt-4.1", "gpt-4.1-2025-04-14", _usd(input="2", cached_input="0.50", output="8"), routes=(RESPONSES,)),
    Model(
        "gpt-4o-audio-preview",
        "gpt-4o-audio-preview-2024-12-17",
        _usd(input="2.50", output="10", audio_input="40", audio_output="80"),
        used=("audio_input", "audio_output"),
    ),
    Model(
        "ft:gpt-4o-mini-2024-07-18:acme::Ab12",
        "ft:gpt-4o-mini-2024-07-18:acme::Ab12",
        _usd(input="0.30", cached_input="0.15", output="1.20"),
    ),
    Model("gpt-3.5-turbo-instruct", "gpt-3.5-turbo-instruct", _usd(input="1.50", output="2"), (COMPLETIONS,), ()),
    Model("text-embedding-3-small", "text-embedding-3-small", _usd(input="0.02"), (EMBEDDINGS,), ()),
    Model("text-embedding-3-large", "text-embedding-3-large", _usd(input="0.13"), (EMBEDDINGS,), ()),
    Model(
        "house-large",
        "house-large-2026-01-02",
        _HOUSE,
        routes=(CHAT, RESPONSES),
        used=("cached_input", "cache_write", "reasoning"),
        tiers=_HOUSE_TIERS,
        row="house-large",
    ),
    Model(
        "house-voice",
        "house-voice",
        _usd(input="0.7654321", output="2.2222222", audio_input="33.3333333", audio_output="66.6666667"),
        used=("cached_input", "audio_input", "audio_output"),
        row="house-voice",
    ),
    Model(
        "ft:house-large:acme:v2:Xy9",
        "ft:house-large:acme:v2:Xy9",
        _usd(input="3.1111111", cached_input="0.7777777", output="9.9999999"),
        row="ft:house-large",
    ),
    Model(
        "house-legacy",
        "house-legacy",
        _usd(input="0.4000003", output="0.4000003"),
        routes=(COMPLETIONS,),
        used=(),
        per_request=Decimal("0.0001234"),
        row="house-legacy",
    ),
    Model("house-embed", "house-embed", _usd(input="0.0123457"), (EMBEDDINGS,), (), row="house-embed"),
    Model("nobody-knows-7b", "nobody-knows-7b", None, routes=(CHAT, COMPLETIONS)),
)


def price_rows() -> list[dict[str, str]]:
    """Return the fields of a ModelPrice row for each model whose price is not on the list."""
    rows = []
    for model in (*MODELS, HEADLESS):
        if not model.row or model.rates is None:
            continue
        fields = {"model": model.row} | {name: str(rate) for name, rate in model.rates.items()}
        fields |= {f"{tier}_factor": str(factor) for tier, factor in model.tiers.items()}
        if model.per_request:
            fields["per_request"] = str(model.per_request)
        rows.append(fields)
    return rows


@dataclass(frozen=True)
class Key:
    """A key of a client's, and what its costs are multiplied by."""

    api_key: str
    factor: Decimal = Decimal(1)
    granted: Decimal = Decimal(10)


KEYS = tuple(
    Key(f"sk-exact-{number:02d}-0123456789abcdef", Decimal(factor), Decimal(granted))
    for number, (factor, granted) in enumerate(
        [("1", "18"), ("0.9", "5.55"), ("1.0725", "0.01"), ("0", "7")] + [("1", "12.345")] * 8
    )
)
WRONG_KEY = Key("sk-exact-wrong-0123456789abcdef")


@dataclass(frozen=True)
class Plan:
    """One request: `words` are what is answered, and how many of them have been sent when it ends midway."""

    number: int
    key: Key
    route: str
    model: Model
    fate: Fate
    streams: bool
    asks_usage: bool
    usage_first: bool  # in a JSON answer
    tier: str
    prompt_words: int
    words: int
    client: str  # raw, async or sync

    @property
    def asked_model(self) -> str:
        # Nothing of the upstream's is in the record of a request without a head: its name has to tell it.
        return f"{HEADLESS.name}-{self.number}" if self.fate.has_no_head else self.model.name

    @property
    def request_id(self) -> str:
        return f"req_exact_{self.number}"

    def body(self) -> dict[str, object]:
        """Return the request as the client writes it."""
        prompt = WORD * self.prompt_words
        body: dict[str, object] = {"model": self.asked_model}
        if self.route == CHAT:
            body["messages"] = [{"role": "user", "content": prompt}]
        elif self.route == COMPLETIONS:
            body["prompt"] = prompt
        else:
            body["input"] = prompt
        if self.tier:
            body["service_tier"] = self.tier
        if self.streams:
            body["stream"] = True
        if self.asks_usage:
            body["stream_options"] = {"include_usage": True}
        return body

    def raw_request(self) -> bytes:
        """Return the bytes of the request, as a plain HTTP client would send them."""
        body = json.dumps(self.body()).encode()
        head = (
            f"POST /v1/{self.route} HTTP/1.1\r\nHost: proxy.example\r\nAuthorization: Bearer {self.key.api_key}\r\n"
            f"Content-Type: application/json\r\nX-Number: {self.number}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def plans(count: int, *, through_sdk: int, seed: int) -> Iterator[Plan]:
    """Yield planned requests, the same for the same seed: 5% hang-ups, 5% cuts, 1% refused; some for the SDK."""
    draw = random.Random(seed)
    for number in range(count):
        client = ("async" if number % 3 else "sync") if number < through_sdk else "raw"
        yield _plan(number, draw, client)


def _plan(number: int, draw: random.Random, client: str) -> Plan:
    chance = draw.random()
    fate = Fate.WHOLE
    if chance < 0.05:
        fate = draw.choice(_HANG_UPS)
    elif chance < 0.10:
        fate = draw.choice(_CUTS)
    elif chance < 0.11:
        fate = draw.choice((Fate.REFUSED, Fate.WRONG_KEY))
    model = draw.choice(MODELS)
    route = draw.choice(model.routes)
    streams = route != EMBEDDINGS and draw.random() < 0.6
    if fate is not Fate.WHOLE and client != "raw":
        # What the SDK lets be seen from outside: streams, left or cut midway, and no answer at all.
        fate = {Fate.CLIENT_BEFORE_HEAD: Fate.CLIENT_MIDWAY, Fate.CLIENT_AFTER_USAGE: Fate.CLIENT_MIDWAY}.get(
            fate, fate
        )
        if fate is Fate.CLIENT_MIDWAY and not streams:
            fate = Fate.WHOLE if route == EMBEDDINGS else fate
            streams = route != EMBEDDINGS
    asks_usage = streams and route in (CHAT, COMPLETIONS) and draw.random() < 0.5
    if fate is Fate.CLIENT_AFTER_USAGE and streams and route != RESPONSES:
        asks_usage = True  # or it would see none to leave after
    return Plan(
        number=number,
        key=WRONG_KEY if fate is Fate.WRONG_KEY else draw.choice(KEYS),
        route=route,
        model=HEADLESS if fate.has_no_head else model,
        fate=fate,
        streams=streams,
        asks_usage=asks_usage,
        usage_first=fate.is_after_usage or (fate is Fate.WHOLE and draw.random() < 0.3),
        tier="" if fate.has_no_head else draw.choice(("", *model.tiers)),
        prompt_words=draw.randint(3, 40),
        words=draw.randint(1, 6),
        client=client,
    )
