"""One realtime conversation, as events in and events out; it echoes text. Pure.

Events and their order: OpenAI's realtime API in its general availability form. Audio is counted, not heard, and
answers are text whatever modality is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from gateway.sandbox.fields import LONGEST_NAME, Fields, SandboxError, missing, wrong_value
from gateway.sandbox.realtime_events import RATE_LIMITS, content_events, read_item, usage_of
from gateway.sandbox.replies import Said, cut_text, reply_to
from gateway.sandbox.router import decode_object
from gateway.sandbox.shelf import MIB, Shelf
from gateway.sandbox.tools import MOST_TOOLS, ToolCall, call_for
from gateway.sandbox.trouble import Manner, manner_of
from gateway.sandbox.wire import Json, encode, error_object


class RealtimeSession:
    """State is bounded: 256 items or 1 MiB of them, the oldest go."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._count = 0
        self._audio_bytes = 0
        self._last_item_id: str | None = None
        self._items: Shelf[Json] = Shelf(most_things=256, most_bytes=MIB)
        self._session: Json = {
            "type": "realtime",
            "object": "realtime.session",
            "id": self._id("sess_"),
            "model": model,
            "output_modalities": ["text"],
            "instructions": "",
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "tracing": None,
            "truncation": "auto",
        }
        self._handlers: dict[str, Callable[[Fields], list[Json]]] = {
            "session.update": self._update,
            "conversation.item.create": self._create_item,
            "conversation.item.retrieve": self._retrieve_item,
            "conversation.item.delete": self._delete_item,
            "conversation.item.truncate": self._truncate_item,
            "input_audio_buffer.append": self._append_audio,
            "input_audio_buffer.commit": self._commit_audio,
            "input_audio_buffer.clear": self._clear_audio,
            "output_audio_buffer.clear": lambda fields: [{"type": "output_audio_buffer.cleared"}],
            "response.create": self._respond,
            "response.cancel": self._cancel,
        }

    def greeting(self) -> list[Json]:
        return self._numbered([{"type": "session.created", "session": self._session}])

    def answer(self, message: str | bytes) -> tuple[list[Json], Manner]:
        """Return the events that answer one message, an `error` event for one that is wrong."""
        event: Json = {}
        manner = manner_of(self._model)
        try:
            event = decode_object(message)
            fields = Fields(event)
            kind = fields.required_text("type")
            handler = self._handlers.get(kind)
            if handler is None:
                raise wrong_value("type", f"'{kind[:100]}'. Supported values are: {', '.join(self._handlers)}.")
            events = handler(fields)
        except SandboxError as error:
            return self._numbered([{"type": "error", "error": _error(error, event)}]), Manner.PLAIN
        if manner is Manner.CUT and kind != "response.create":
            manner = Manner.PLAIN
        return self._numbered(events), manner

    def _numbered(self, events: list[Json]) -> list[Json]:
        return [{"type": event["type"], "event_id": self._id("event_")} | event for event in events]

    def _id(self, prefix: str) -> str:
        """Return an id that follows from the model and from how much was said before."""
        self._count += 1
        return prefix + hashlib.sha256(f"{self._model}\n{self._count}".encode()).hexdigest()[:21]

    def _update(self, fields: Fields) -> list[Json]:
        change = fields.mapping("session")
        if not change:
            raise missing("session")
        fixed = {name: self._session[name] for name in ("id", "object", "model")}
        self._session = self._session | change | fixed
        return [{"type": "session.updated", "session": self._session}]

    def _create_item(self, fields: Fields) -> list[Json]:
        given = fields.mapping("item")
        if not given:
            raise missing("item")
        read_item(given)
        name = Fields(given).text("id") or self._id("item_")
        if len(name) > LONGEST_NAME:
            raise wrong_value("item.id", f"longer than {LONGEST_NAME} characters.", "string_above_max_length")
        item = given | {"id": name, "object": "realtime.item", "status": "completed"}
        return self._added(item)

    def _added(self, item: Json) -> list[Json]:
        place = {"previous_item_id": self._last_item_id, "item": item}
        self._keep(item)
        return [{"type": "conversation.item.added", **place}, {"type": "conversation.item.done", **place}]

    def _keep(self, item: Json) -> None:
        if not self._items.put(item["id"], item, size_bytes=len(encode(item))):
            raise SandboxError(
                400, "The sandbox keeps items of up to 1 MiB.", param="item", code="string_above_max_length"
            )
        self._last_item_id = item["id"]

    def _found(self, fields: Fields) -> Json:
        name = fields.required_text("item_id")
        item = self._items.get(name)
        if item is None:
            raise SandboxError(400, f"Item '{name[:100]}' does not exist.", param="item_id", code="item_not_found")
        return item

    def _retrieve_item(self, fields: Fields) -> list[Json]:
        return [{"type": "conversation.item.retrieved", "item": self._found(fields)}]

    def _delete_item(self, fields: Fields) -> list[Json]:
        item = self._found(fields)
        self._items.take(item["id"])
        return [{"type": "conversation.item.deleted", "item_id": item["id"]}]

    def _truncate_item(self, fields: Fields) -> list[Json]:
        item = self._found(fields)
        place = {
            "content_index": fields.whole("content_index", least=0, most=MIB) or 0,
            "audio_end_ms": fields.whole("audio_end_ms", least=0, most=10**9) or 0,
        }
        return [{"type": "conversation.item.truncated", "item_id": item["id"], **place}]

    def _append_audio(self, fields: Fields) -> list[Json]:
        self._audio_bytes += len(fields.required_text("audio")) * 3 // 4
        return []

    def _commit_audio(self, fields: Fields) -> list[Json]:
        if not self._audio_bytes:
            raise SandboxError(
                400, "Error committing input audio buffer: it is empty.", code="input_audio_buffer_commit_empty"
            )
        text = f"{self._audio_bytes} bytes of audio"
        self._audio_bytes = 0
        item = {
            "id": self._id("item_"),
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": text}],
        }
        committed = {"previous_item_id": self._last_item_id, "item_id": item["id"]}
        return [{"type": "input_audio_buffer.committed", **committed}, *self._added(item)]

    def _clear_audio(self, fields: Fields) -> list[Json]:
        self._audio_bytes = 0
        return [{"type": "input_audio_buffer.cleared"}]

    def _cancel(self, fields: Fields) -> list[Json]:
        raise SandboxError(400, "Cancellation failed: no active response found.", code="response_cancel_not_active")

    def _respond(self, fields: Fields) -> list[Json]:
        # What the request sets stands over the session for this one response.
        asked_for = Fields(self._session | fields.mapping("response"))
        given = asked_for.raw("input")
        items = list(self._items) if given is None else asked_for.items("input")
        conversation = [read_item(item) for item in items]
        asked = conversation[-1] if conversation else Said("user", "")
        tools = asked_for.items("tools", most=MOST_TOOLS)
        tool_call = call_for(tools, asked_for.raw("tool_choice"), asked)
        limit = (
            None
            if asked_for.raw("max_output_tokens") == "inf"
            else asked_for.whole("max_output_tokens", least=1, most=10**6)
        )
        text, reason = cut_text(reply_to(asked, self._model), (), limit)
        item = self._output_item(tool_call, text, reason)
        in_conversation = asked_for.raw("conversation") != "none"
        response: Json = {
            "object": "realtime.response",
            "id": self._id("resp_"),
            "status": "completed" if tool_call or reason == "stop" else "incomplete",
            "status_details": None,
            "output": [item],
            "conversation_id": self._session["id"].replace("sess_", "conv_") if in_conversation else None,
            "output_modalities": ["text"],
            "max_output_tokens": asked_for.raw("max_output_tokens"),
            "metadata": asked_for.raw("metadata"),
            "usage": usage_of(conversation, tool_call.name + tool_call.input if tool_call else text),
        }
        if response["status"] == "incomplete":
            response["status_details"] = {"type": "incomplete", "reason": "max_output_tokens"}
        return self._response_events(response, item, in_conversation=in_conversation)

    def _output_item(self, tool_call: ToolCall | None, text: str, reason: str) -> Json:
        item = {"id": self._id("item_"), "object": "realtime.item"}
        if tool_call is None:
            status = "completed" if reason == "stop" else "incomplete"
            content = [{"type": "output_text", "text": text}]
            return item | {"type": "message", "status": status, "role": "assistant", "content": content}
        call = {"name": tool_call.name, "call_id": self._id("call_"), "arguments": tool_call.input}
        return item | {"type": "function_call", "status": "completed"} | call

    def _response_events(self, response: Json, item: Json, *, in_conversation: bool) -> list[Json]:
        empty: Json = {"content": []} if "content" in item else {"arguments": ""}
        begun = item | {"status": "in_progress"} | empty
        output = {"response_id": response["id"], "output_index": 0}
        previous = {"previous_item_id": self._last_item_id}
        unfinished: Json = {"status": "in_progress", "status_details": None, "output": [], "usage": None}
        if in_conversation:
            self._keep(item)
        conversation_events = [
            {"type": "conversation.item.added", **previous, "item": begun},
            {"type": "conversation.item.done", **previous, "item": item},
        ]
        added, done = ([event] if in_conversation else [] for event in conversation_events)
        return [
            {"type": "response.created", "response": response | unfinished},
            {"type": "response.output_item.added", **output, "item": begun},
            *added,
            *content_events(output, item),
            *done,
            {"type": "response.output_item.done", **output, "item": item},
            {"type": "response.done", "response": response},
            {"type": "rate_limits.updated", "rate_limits": RATE_LIMITS},
        ]


def _error(error: SandboxError, event: Json) -> Json:
    client_event_id = event.get("event_id")
    return error_object(error) | {"event_id": client_event_id if isinstance(client_event_id, str) else None}
