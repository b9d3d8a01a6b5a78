"""A finished response of /v1/responses, told as the events of its stream. Pure."""

from __future__ import annotations

from gateway.sandbox.tokens import pieces_of
from gateway.sandbox.wire import Json

_PIECES = 40
_UNFINISHED: Json = {
    "status": "in_progress",
    "output": [],
    "usage": None,
    "completed_at": None,
    "incomplete_details": None,
}


def events_of(response: Json) -> list[Json]:
    """Return the events, numbered from 0 by `sequence_number`; the last holds the response itself."""
    begun = response | _UNFINISHED
    events: list[Json] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    for index, item in enumerate(response["output"]):
        events.extend(_item_events(index, item))
    events.append({"type": f"response.{response['status']}", "response": response})
    return [{"type": event["type"], "sequence_number": number} | event for number, event in enumerate(events)]


def _item_events(index: int, item: Json) -> list[Json]:
    inner = {
        "message": _text_events,
        "function_call": _arguments_events,
        "custom_tool_call": _input_events,
    }
    empty: dict[str, Json] = {
        "message": {"content": []},
        "function_call": {"arguments": ""},
        "custom_tool_call": {"input": ""},
    }
    kind = item["type"]
    begun = item | empty[kind] | {"status": "in_progress"}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        *inner[kind](index, item),
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]


def _text_events(index: int, item: Json) -> list[Json]:
    place = {"item_id": item["id"], "output_index": index, "content_index": 0}
    part = item["content"][0]
    text = part["text"]
    return [
        {"type": "response.content_part.added", **place, "part": part | {"text": ""}},
        *(
            {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
            for piece in pieces_of(text, at_most=_PIECES)
        ),
        {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
    ]


def _arguments_events(index: int, item: Json) -> list[Json]:
    place = {"item_id": item["id"], "output_index": index}
    done = {"type": "response.function_call_arguments.done", **place}
    return [
        *(
            {"type": "response.function_call_arguments.delta", **place, "delta": piece}
            for piece in pieces_of(item["arguments"], at_most=_PIECES)
        ),
        done | {"name": item["name"], "arguments": item["arguments"]},
    ]


def _input_events(index: int, item: Json) -> list[Json]:
    place = {"item_id": item["id"], "output_index": index}
    return [
        *(
            {"type": "response.custom_tool_call_input.delta", **place, "delta": piece}
            for piece in pieces_of(item["input"], at_most=_PIECES)
        ),
        {"type": "response.custom_tool_call_input.done", **place, "input": item["input"]},
    ]
