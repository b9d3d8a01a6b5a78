"""Parts of the realtime API's events: what an item says, how an answer is told. Pure."""

from __future__ import annotations

from gateway.sandbox.fields import Fields, missing, wrong_type, wrong_value
from gateway.sandbox.replies import Said, read_content
from gateway.sandbox.tokens import pieces_of, tokens_in
from gateway.sandbox.wire import Json

_PIECES = 40

RATE_LIMITS = [
    {"name": "requests", "limit": 10000, "remaining": 9999, "reset_seconds": 0.006},
    {"name": "tokens", "limit": 200000, "remaining": 199000, "reset_seconds": 0.3},
]


def content_events(output: Json, item: Json) -> list[Json]:
    place = output | {"item_id": item["id"]}
    if item["type"] == "function_call":
        deltas = [
            {"type": "response.function_call_arguments.delta", **place, "call_id": item["call_id"], "delta": piece}
            for piece in pieces_of(item["arguments"], at_most=_PIECES)
        ]
        call = {name: item[name] for name in ("call_id", "name", "arguments")}
        return [*deltas, {"type": "response.function_call_arguments.done", **place, **call}]
    place["content_index"] = 0
    text = item["content"][0]["text"]
    deltas = [
        {"type": "response.output_text.delta", **place, "delta": piece} for piece in pieces_of(text, at_most=_PIECES)
    ]
    return [
        {"type": "response.content_part.added", **place, "part": {"type": "text", "text": ""}},
        *deltas,
        {"type": "response.output_text.done", **place, "text": text},
        {"type": "response.content_part.done", **place, "part": {"type": "text", "text": text}},
    ]


def read_item(item: object) -> Said:
    """Return what a conversation item says; SandboxError 400 for what is none."""
    if not isinstance(item, dict):
        raise wrong_type("item", "an object", item)
    fields = Fields(item)
    kind = fields.required_text("type")
    if kind == "function_call_output":
        return Said("tool", fields.text("output") or "")
    if kind == "function_call":
        return Said("assistant", fields.text("arguments") or "")
    if kind != "message":
        raise wrong_value("item.type", f"the sandbox knows no '{kind[:100]}'.")
    role = fields.choice("role", ("user", "assistant", "system"), "")
    if not role:
        raise missing("item.role")
    said = read_content(role, fields.raw("content"), param="item.content")
    return said if said.text else Said(role, _transcripts(fields.raw("content")), said.attachments)


def _transcripts(content: object) -> str:
    parts = content if isinstance(content, list) else []
    return "\n".join(part["transcript"] for part in parts if isinstance(part.get("transcript"), str))


def usage_of(conversation: list[Said], text: str) -> Json:
    input_tokens = sum(said.tokens for said in conversation)
    output_tokens = tokens_in(text)
    return {
        "total_tokens": input_tokens + output_tokens,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "input_token_details": {
            "text_tokens": input_tokens,
            "audio_tokens": 0,
            "image_tokens": 0,
            "cached_tokens": 0,
        },
        "output_token_details": {"text_tokens": output_tokens, "audio_tokens": 0},
    }
