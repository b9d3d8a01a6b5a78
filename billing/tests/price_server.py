"""A server of price lists, in the form in which the package's project publishes them."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import TieredPrices

from billing.tests.price_examples import AT

Rates = dict[str, str]
_PART_BYTES = 65536


def published(**openai: Rates) -> list[dict[str, Any]]:
    """Return OpenAI's rows as they are published, with other prices for some."""
    return [_provider("openai", openai)]


def published_by(**providers: dict[str, Rates]) -> list[dict[str, Any]]:
    """Return the rows of OpenAI and of other providers, with other prices for some."""
    return [_provider(name.replace("_", "-"), changes) for name, changes in ({"openai": {}} | providers).items()]


def _provider(name: str, changes: dict[str, Rates]) -> dict[str, Any]:
    known = next(provider for provider in get_snapshot().providers if provider.id == name)
    models = {
        row.id: {"id": row.id, "match": {"equals": row.id.lower()}, "prices": _raw_prices(row.get_prices(AT))}
        for row in known.models
    }
    for model, prices in changes.items():
        models.setdefault(model, {"id": model, "match": {"equals": model}})["prices"] = prices
    return {"id": name, "name": name, "api_pattern": f"https://{name}", "models": list(models.values())}


def _raw_prices(prices: object) -> dict[str, Any]:
    return {
        key: {"base": str(value.base), "tiers": [{"start": t.start, "price": str(t.price)} for t in value.tiers]}
        if isinstance(value, TieredPrices)
        else str(value)
        for key, value in vars(prices).items()
    }


class PriceServer:
    """`with PriceServer() as server:` serves `server.body` with `server.status` at `server.url`."""

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(outer.status)
                if outer.coding:
                    self.send_header("Content-Encoding", outer.coding)
                self.end_headers()
                outer.sent_bytes = 0
                with contextlib.suppress(ConnectionError):  # a client may have had enough
                    for start in range(0, len(outer.body), _PART_BYTES):
                        self.wfile.write(outer.body[start : start + _PART_BYTES])
                        outer.sent_bytes = start + _PART_BYTES

            def log_message(self, *_: object) -> None:
                pass

        self.status = 200
        self.coding = ""
        self.sent_bytes = 0
        self.body = json.dumps(rows or []).encode()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/data.json"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def publish(self, rows: list[dict[str, Any]]) -> None:
        self.body = json.dumps(rows).encode()

    def __enter__(self) -> PriceServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
