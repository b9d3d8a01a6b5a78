"""POST /v1/responses, streamed and not, and what can be done with a stored one."""

from __future__ import annotations

from typing import Any

from gateway.sandbox.fields import MOST_ITEMS, Fields, SandboxError, missing, too_many, wrong_type, wrong_value
from gateway.sandbox.replies import Said, cut_text, read_content, reply_to, structured_reply
from gateway.sandbox.response_events import events_of
from gateway.sandbox.shelf import KEPT_BY_WORKER, MIB, Stock, StoredResponse
from gateway.sandbox.tokens import tokens_in
from gateway.sandbox.tools import MOST_TOOLS, ToolCall, call_for
from gateway.sandbox.wire import CREATED, Answer, Call, Json, encode, event_stream, json_answer, sse

_MOST_ECHOED_BYTES = MIB
_ECHOED: Json = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
    "metadata": {},
}


def create(call: Call, stock: Stock) -> Answer:
    response = respond(call, stock)
    if call.fields.flag("stream"):
        return event_stream(sse(event, named=True) for event in events_of(response))
    return json_answer(response)


def respond(call: Call, stock: Stock, *, last_id: str | None = None) -> Json:
    """Return the finished response, and store it unless `store` is false or it is too large to keep.

    It may go on from a stored one, or from the session's last, of `last_id`. SandboxError 400 for any other.
    """
    fields = call.fields
    model = fields.model()
    previous = fields.text("previous_response_id")
    if previous and previous != last_id and stock.responses.get(previous) is None:
        raise SandboxError(
            400,
            f"Previous response with id '{previous[:200]}' not found. {KEPT_BY_WORKER}",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    items = _input_items(fields.raw("input"))
    conversation = [_read_item(item, f"input[{index}]") for index, item in enumerate(items)]
    if instructions := fields.text("instructions"):
        conversation.insert(0, Said("system", instructions))
    output, output_tokens, whole = _output(call, model, conversation)
    input_tokens = _input_tokens(fields, conversation)
    response = _echo(fields) | {
        "id": call.id("resp_", length=48),
        "object": "response",
        "created_at": CREATED,
        "completed_at": CREATED + 1 if whole else None,
        "status": "completed" if whole else "incomplete",
        "error": None,
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
        "model": model,
        "output": output,
        "service_tier": "default",
        "usage": _usage(input_tokens, output_tokens),
    }
    body_bytes = len(encode(response))
    if body_bytes > _MOST_ECHOED_BYTES:
        raise wrong_value("instructions", "the sandbox echoes at most 1 MiB of instructions, tools and the like.")
    if response["store"]:
        kept = StoredResponse(response, _numbered(call, items))
        stock.responses.put(response["id"], kept, size_bytes=body_bytes + len(encode(items)))
    return response


def retrieve(call: Call, stock: Stock) -> Answer:
    response = _stored(call, stock).response
    if call.query.get("stream") == "true":
        after = call.query.get("starting_after", "")
        first = int(after) + 1 if after.isascii() and after.isdigit() and len(after) < 10 else 0
        return event_stream(sse(event, named=True) for event in events_of(response)[first:])
    return json_answer(response)


def delete(call: Call, stock: Stock) -> Answer:
    response = _stored(call, stock).response
    stock.responses.take(response["id"])
    return json_answer({"id": response["id"], "object": "response", "deleted": True})


def input_items(call: Call, stock: Stock) -> Answer:
    """Return what was asked, newest first unless `order=asc`."""
    items = _stored(call, stock).input_items
    data = items if call.query.get("order") == "asc" else items[::-1]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": "", "last_id": ""}
    return json_answer({"object": "list", "data": data, "has_more": False} | ends)


def input_tokens(call: Call, stock: Stock) -> Answer:
    items = _input_items(call.fields.raw("input"))
    conversation = [_read_item(item, f"input[{index}]") for index, item in enumerate(items)]
    if instructions := call.fields.text("instructions"):
        conversation.insert(0, Said("system", instructions))
    count = _input_tokens(call.fields, conversation)
    return json_answer({"object": "response.input_tokens", "input_tokens": count})


def _stored(call: Call, stock: Stock) -> StoredResponse:
    name = call.arguments[0]
    found = stock.responses.get(name)
    if found is None:
        raise SandboxError(404, f"Response with id '{name[:200]}' not found. {KEPT_BY_WORKER}")
    return found


def _input_items(value: object) -> list[Json]:
    if value is None or value in ("", []):
        raise missing("input")
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    if not isinstance(value, list):
        raise wrong_type("input", "a string or an array", value)
    if len(value) > MOST_ITEMS:
        raise too_many("input", MOST_ITEMS)
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise wrong_type(f"input[{index}]", "an object", item)
    return value


def _read_item(item: Json, param: str) -> Said:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str):
            raise missing(f"{param}.role")
        return read_content(role, item.get("content"), param=f"{param}.content")
    if str(kind).endswith("_output"):
        return read_content("tool", item.get("output"), param=f"{param}.output")
    return Said("assistant", str(item.get("arguments") or item.get("input") or ""))


def _numbered(call: Call, items: list[Json]) -> list[Json]:
    """Return the items as the API lists them: with ids, text content as parts."""
    listed = []
    for index, item in enumerate(items):
        kept: Json = {"id": call.id("msg_", "input", index), "type": "message", "status": "completed"} | item
        if kept["type"] == "message" and isinstance(kept.get("content"), str):
            part: Json = {"type": "input_text", "text": kept["content"]}
            if kept.get("role") == "assistant":
                part = {"type": "output_text", "text": kept["content"], "annotations": []}
            kept["content"] = [part]
        listed.append(kept)
    return listed


def _output(call: Call, model: str, conversation: list[Said]) -> tuple[list[Json], int, bool]:
    """Return the output items, their tokens, and whether they are whole (not cut by max_output_tokens)."""
    fields = call.fields
    asked = conversation[-1]
    tool_call = call_for(fields.items("tools", most=MOST_TOOLS), fields.raw("tool_choice"), asked)
    if tool_call is not None:
        return [_tool_item(call, tool_call)], tokens_in(tool_call.name + tool_call.input), True
    form = Fields(fields.mapping("text")).mapping("format")
    text = structured_reply(form, asked, param="text.format") or reply_to(asked, model)
    limit = fields.whole("max_output_tokens", least=1, most=10**9)
    text, reason = cut_text(text, (), limit)
    item = {
        "id": call.id("msg_", length=48),
        "type": "message",
        "status": "completed" if reason == "stop" else "incomplete",
        "role": "assistant",
        "content": [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}],
    }
    return [item], tokens_in(text), reason == "stop"


def _tool_item(call: Call, tool_call: ToolCall) -> Json:
    kind, prefix, key = ("function_call", "fc_", "arguments")
    if tool_call.custom:
        kind, prefix, key = ("custom_tool_call", "ctc_", "input")
    return {
        "id": call.id(prefix, length=48),
        "type": kind,
        "status": "completed",
        "call_id": call.id("call_"),
        "name": tool_call.name,
        key: tool_call.input,
    }


def _echo(fields: Fields) -> Json:
    echoed = {name: default if fields.raw(name) is None else fields.raw(name) for name, default in _ECHOED.items()}
    conversation: Any = fields.raw("conversation")
    if conversation is not None:
        echoed["conversation"] = {"id": conversation} if isinstance(conversation, str) else conversation
    return echoed


def _input_tokens(fields: Fields, conversation: list[Said]) -> int:
    tools = fields.items("tools", most=MOST_TOOLS)
    return sum(said.tokens for said in conversation) + (tokens_in(encode(tools).decode()) if tools else 0)


def _usage(input_count: int, output_count: int) -> Json:
    return {
        "input_tokens": input_count,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": output_count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_count + output_count,
    }
