"""The Responses API over a WebSocket: one `response.create` in, the events of its stream out. Pure."""

from __future__ import annotations

from gateway.sandbox.fields import Fields, SandboxError, wrong_value
from gateway.sandbox.response_events import events_of
from gateway.sandbox.router import decode_object, seed_of
from gateway.sandbox.routes.responses import respond
from gateway.sandbox.shelf import Stock
from gateway.sandbox.trouble import Manner, manner_of, refusal_by
from gateway.sandbox.wire import Call, Json, error_object

_PATH = "/v1/responses"
# What stands around a request on a WebSocket and is no part of it.
_ENVELOPE = ("type", "stream_id", "generate")


class ResponsesSession:
    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._last_id: str | None = None

    def greeting(self) -> list[Json]:
        return []

    def answer(self, message: str | bytes) -> tuple[list[Json], Manner]:
        """Return the events that answer one message; what the client named by `stream_id` is so named in all."""
        event: Json = {}
        try:
            event = decode_object(message)
            events, manner = self._respond(event)
        except SandboxError as error:
            events = [{"type": "error", "status": error.status, "error": error_object(error)}]
            manner = Manner.PLAIN
        lane = event.get("stream_id")
        named = {"stream_id": lane} if isinstance(lane, str) else {}
        return [one | named for one in events], manner

    def _respond(self, event: Json) -> tuple[list[Json], Manner]:
        fields = Fields({name: value for name, value in event.items() if name not in _ENVELOPE})
        kind = Fields(event).required_text("type")
        if kind != "response.create":
            raise wrong_value("type", f"'{kind[:100]}'. The sandbox understands 'response.create'.")
        if refusal := refusal_by(fields.raw("model")):
            raise refusal
        call = Call("POST", (), {}, fields, (), seed_of(_PATH, fields.values, ()))
        response = respond(call, self._stock, last_id=self._last_id)
        self._last_id = response["id"]
        if event.get("generate") is False:
            response = _prepared_only(response)
        return events_of(response), manner_of(fields.raw("model"))


def _prepared_only(response: Json) -> Json:
    usage = response["usage"]
    nothing_out = {"output_tokens": 0, "total_tokens": usage["input_tokens"]}
    return response | {"output": [], "usage": usage | nothing_out}
