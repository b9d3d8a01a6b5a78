"""One run of all plans through a live proxy, and what everybody says of it afterwards."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from openai import OpenAI

from billing import keys as key_names
from gateway.tests.exact_clients import Seen, run_async, run_raw, run_sync
from gateway.tests.exact_plans import COLUMNS, KEYS, WORD, WRONG_KEY, Buckets, Key, Plan, price_rows
from gateway.tests.exact_upstream import CountingUpstream
from gateway.tests.fake_upstream import FakeUpstream
from gateway.tests.live import LiveProxy

Sums = dict[tuple[Any, ...], list[int]]

SANDBOX_KEY = Key("sk-sandbox", granted=Decimal(3))
DEFAULT_GRANT_USD = Decimal("0.25")
_PATIENCE_S = 600.0
# The sandbox writes as slowly as a model.
_SANDBOX_THREADS = 8
_RECORDS = (
    "SELECT r.upstream_request_id, r.model, r.endpoint, r.status, r.outcome, r.usage_source, r.service_tier, "
    f"r.is_stream, r.cost_usd, r.pricing, k.fingerprint, {COLUMNS} "
    "FROM billing_usagerecord r LEFT JOIN billing_apikey k ON k.id = r.key_id"
)
_TOKENS = [name for name in COLUMNS.split(", ") if name != "reasoning_tokens"]  # those are output tokens as well
_EACH_SUM = ", ".join(f"SUM({name})" for name in ("cost_usd", *COLUMNS.split(", ")))
_TALLY = f"COUNT(*), SUM(cost_usd), SUM({' + '.join(_TOKENS)})"
_TALLIED = "SUM(requests), SUM(cost_usd), SUM(tokens)"
# Of each roll-up: what it says, and what the records say.
_ROLL_UPS = {
    "usage by day": (
        f"SELECT key_id, day, endpoint, SUM(requests), {_EACH_SUM} FROM billing_usageday GROUP BY 1, 2, 3",
        f"SELECT key_id, day, endpoint, COUNT(*), {_EACH_SUM} FROM billing_usagerecord GROUP BY 1, 2, 3",
    ),
    "keys by day": (
        f"SELECT key_id, day, 0, {_TALLIED} FROM billing_keyday GROUP BY 1, 2, 3",
        f"SELECT key_id, day, 0, {_TALLY} FROM billing_usagerecord WHERE key_id IS NOT NULL GROUP BY 1, 2, 3",
    ),
    "usage by hour": (
        f"SELECT 0, day, endpoint, {_TALLIED} FROM billing_usagehour GROUP BY 1, 2, 3",
        f"SELECT 0, day, endpoint, {_TALLY} FROM billing_usagerecord GROUP BY 1, 2, 3",
    ),
}
_PREPARE = """
import datetime, json
from decimal import Decimal
from billing.models import ApiKey, Grant, ModelPrice
given = json.loads({!r})
since = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
for row in given["prices"]:
    ModelPrice.objects.create(valid_from=since, **row)
for fingerprint, factor, amounts in given["keys"]:
    key = ApiKey.objects.create(fingerprint=fingerprint, hint="test", price_factor=Decimal(factor))
    for amount in amounts:
        Grant.objects.create(key=key, amount_usd=Decimal(amount), valid_from=since)
"""
# All from one machine, as fast as it can.
_ENVIRONMENT = {
    "SANDBOX_ENABLED": "true",
    "JOURNAL_FLUSH_SECONDS": "0.2",
    "BALANCE_RATE_PER_MINUTE": "100000",
    "DEFAULT_GRANT_USD": str(DEFAULT_GRANT_USD),
}


class Record(NamedTuple):
    """A row of the ledger; `fingerprint` is its key's."""

    request_id: str
    model: str
    endpoint: str
    status: int
    outcome: str
    source: str
    tier: str
    is_stream: bool
    cost: Decimal | None
    pricing: str
    fingerprint: str | None
    buckets: Buckets

    @property
    def name(self) -> str:
        """What tells whose it is: the upstream's id of the request, or the model of one that got no answer."""
        return self.request_id or self.model


class Told(NamedTuple):
    """What the sandbox told a client of one request."""

    endpoint: str
    model: str
    input_tokens: int
    output_tokens: int


@dataclass
class Run:
    """The plans, and what the upstream, the clients and the ledger say of them."""

    plans: list[Plan]
    upstream: CountingUpstream
    seen: dict[int, Seen]
    sandbox: list[Told]
    records: list[Record]
    records_after_the_end: int
    roll_ups: dict[str, tuple[Sums, Sums]]
    balances: dict[Key, dict[str, Decimal]]
    usages: dict[Key, dict[str, Any]]
    fingerprints: dict[Key, str]

    def records_of(self, key: Key) -> list[Record]:
        return [record for record in self.records if record.fingerprint == self.fingerprints[key]]

    def spent(self, key: Key) -> Decimal:
        """Return what the records of a key sum up to, in USD."""
        return sum((record.cost or Decimal(0) for record in self.records_of(key)), Decimal(0))


def carry_out(plans: list[Plan], *, sandbox_requests: int, workers: int) -> Run:
    """Send everything through a proxy of its own, and ask its ledger when all is recorded, and after its end."""
    counting = CountingUpstream(plans)
    upstream = FakeUpstream(counting.play)
    with upstream, LiveProxy(UPSTREAM_URL=upstream.url, WORKERS=str(workers), **_ENVIRONMENT) as proxy:
        fingerprints = _prepare(proxy)
        seen, sandbox = _send(proxy, upstream, counting, sandbox_requests)
        assert not upstream.failures
        expected = len(plans) + len(sandbox)
        proxy.wait_for_rows("SELECT event_id FROM billing_usagerecord", expected, _PATIENCE_S)
        keys = (*KEYS, SANDBOX_KEY)
        balances = {key: _ask_ledger(proxy, key, "/pro/balance") for key in keys}
        usages = {key: _ask_ledger(proxy, key, "/pro/usage") for key in keys}
        proxy.stop()
        rows = proxy.rows(_RECORDS)
        return Run(
            plans=plans,
            upstream=counting,
            seen=seen,
            sandbox=sandbox,
            records=[_record(row) for row in rows],
            records_after_the_end=len(rows),
            roll_ups={name: (_sums(proxy, rolled), _sums(proxy, own)) for name, (rolled, own) in _ROLL_UPS.items()},
            balances=balances,
            usages=usages,
            fingerprints=fingerprints,
        )


def _prepare(proxy: LiveProxy) -> dict[Key, str]:
    """Enter prices, keys and grants as an operator would beforehand; return the keys' fingerprints."""
    pepper = (proxy.var_dir / "key_pepper").read_text().strip().encode()
    every = (*KEYS, SANDBOX_KEY, WRONG_KEY)
    fingerprints = {key: key_names.fingerprint(key.api_key.encode(), pepper=pepper) for key in every}
    entered = [(fingerprints[key], str(key.factor), [str(key.granted), "1"]) for key in every if key is not WRONG_KEY]
    proxy.manage("shell", "-c", _PREPARE.format(json.dumps({"prices": price_rows(), "keys": entered})))
    return fingerprints


def _send(
    proxy: LiveProxy, upstream: FakeUpstream, counting: CountingUpstream, sandbox_requests: int
) -> tuple[dict[int, Seen], list[Told]]:
    by_client: dict[str, list[Plan]] = {"raw": [], "async": [], "sync": []}
    for plan in counting.plans:
        by_client[plan.client].append(plan)
    raw = asyncio.run_coroutine_threadsafe(run_raw(proxy.port, by_client["raw"], counting), upstream.loop)
    with ThreadPoolExecutor(3) as threads:
        jobs = [
            threads.submit(run_sync, proxy.url, by_client["sync"]),
            threads.submit(lambda: asyncio.run(run_async(proxy.url, by_client["async"]))),
        ]
        sandbox = threads.submit(_ask_sandbox, proxy.url, sandbox_requests)
        seen = raw.result(_PATIENCE_S)
        for job in jobs:
            seen |= job.result(_PATIENCE_S)
        return seen, sandbox.result(_PATIENCE_S)


def _ask_sandbox(url: str, count: int) -> list[Told]:
    """Ask the sandbox with OpenAI's client, each question whole and streamed: both use the same, and one says so."""
    with (
        OpenAI(api_key=SANDBOX_KEY.api_key, base_url=f"{url}/v1", max_retries=0, timeout=60) as client,
        ThreadPoolExecutor(_SANDBOX_THREADS) as threads,
    ):
        prompts = [f"{number}{WORD * (number % 7)}" for number in range(count // 6)]
        answers = threads.map(lambda prompt: _ask_all_of_sandbox(client, prompt), prompts)
        return [told for answer in answers for told in answer]


def _ask_all_of_sandbox(client: OpenAI, prompt: str) -> list[Told]:
    embedding = client.embeddings.create(model="text-embedding-3-small", input=prompt)
    completion = client.completions.create(model="gpt-3.5-turbo-instruct", prompt=prompt)
    return [
        *_ask_sandbox_for_text(client, prompt),
        Told("/v1/embeddings", embedding.model, embedding.usage.prompt_tokens, 0),
        _told_of_chat("/v1/completions", completion),
    ]


def _ask_sandbox_for_text(client: OpenAI, prompt: str) -> list[Told]:
    chat: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}]}
    completion = client.chat.completions.create(**chat)
    assert "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**chat, stream=True)
    )
    response = client.responses.create(model="gpt-4o-mini", input=prompt)
    with client.responses.stream(model="gpt-4o-mini", input=prompt) as stream:
        streamed = stream.get_final_response()
    of_chat = _told_of_chat("/v1/chat/completions", completion)
    return [of_chat, of_chat, _told_of_response(response), _told_of_response(streamed)]


def _told_of_chat(endpoint: str, answer: Any) -> Told:
    return Told(endpoint, answer.model, answer.usage.prompt_tokens, answer.usage.completion_tokens)


def _told_of_response(response: Any) -> Told:
    return Told("/v1/responses", response.model, response.usage.input_tokens, response.usage.output_tokens)


def _ask_ledger(proxy: LiveProxy, key: Key, path: str) -> dict[str, Any]:
    answer = proxy.get(path, headers={"Authorization": f"Bearer {key.api_key}"})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = json.loads(answer.text, parse_float=Decimal)["data"]
    return data


def _record(row: tuple[Any, ...]) -> Record:
    cost = None if row[8] is None else Decimal(int(row[8])) / 10**7
    return Record(*row[:7], bool(row[7]), cost, *row[9:11], Buckets(*row[11:]))


def _sums(proxy: LiveProxy, statement: str) -> Sums:
    """Return sums by what stands in the first three columns, as whole numbers whatever the database says them in."""
    found = proxy.rows(statement)
    return {(key, str(day), endpoint): [int(number or 0) for number in sums] for key, day, endpoint, *sums in found}
