"""POST /v1/chat/completions, streamed and not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.sandbox.fields import Fields, missing, wrong_value
from gateway.sandbox.logprobs import chat_logprobs, check_logprobs
from gateway.sandbox.replies import (
    Said,
    cut_text,
    last_asked,
    read_messages,
    reply_to,
    stops_of,
    structured_reply,
)
from gateway.sandbox.shelf import Stock
from gateway.sandbox.tokens import pieces_of, tokens_in
from gateway.sandbox.tools import MOST_TOOLS, ToolCall, call_for
from gateway.sandbox.wire import CREATED, DONE, Answer, Call, Json, encode, event_stream, json_answer, sse

MOST_CHOICES = 128
_MOST_TOP_LOGPROBS = 20
# Shared by the choices of a request, so that a stream has an end in sight whatever `n` is.
PIECES_PER_STREAM = 40


@dataclass(frozen=True, slots=True)
class Choice:
    text: str
    finish_reason: str
    tool_call: ToolCall | None = None

    @property
    def tokens(self) -> int:
        if self.tool_call is not None:
            return tokens_in(self.tool_call.name + self.tool_call.input)
        return tokens_in(self.text)


def create(call: Call, stock: Stock) -> Answer:
    fields = call.fields
    model = fields.model()
    if not fields.items("messages"):
        raise missing("messages")
    conversation = read_messages(fields.items("messages"))
    choices = _choices(fields, model, last_asked(conversation), spoke_last=conversation[-1])
    top = _top_logprobs(fields)
    check_logprobs((choice.text for choice in choices), top)
    usage = usage_of(_prompt_tokens(fields, conversation), sum(choice.tokens for choice in choices))
    if fields.flag("stream"):
        include_usage = bool(fields.mapping("stream_options").get("include_usage"))
        return event_stream(_stream(call, model, choices, usage if include_usage else None, top))
    whole = _whole(call, choices, top)
    return json_answer(_head(call, model, "chat.completion") | {"choices": whole, "usage": usage})


def usage_of(prompt_tokens: int, completion_tokens: int) -> Json:
    """Return the usage object of chat and text completions."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _prompt_tokens(fields: Fields, conversation: list[Said]) -> int:
    tools = fields.items("tools", most=MOST_TOOLS)
    return sum(said.tokens for said in conversation) + (tokens_in(encode(tools).decode()) if tools else 0)


def _choices(fields: Fields, model: str, asked: Said, *, spoke_last: Said) -> list[Choice]:
    count = fields.whole("n", least=1, most=MOST_CHOICES) or 1
    limit = fields.whole("max_completion_tokens", least=1, most=10**9)
    if limit is None:
        limit = fields.whole("max_tokens", least=1, most=10**9)
    stops = stops_of(fields)
    tool_call = call_for(fields.items("tools", most=MOST_TOOLS), fields.raw("tool_choice"), spoke_last)
    if tool_call is not None:
        return [Choice("", "tool_calls", tool_call)] * count
    structured = structured_reply(_format(fields), asked, param="response_format.json_schema")
    texts = (structured or reply_to(asked, model, index=index, of=count) for index in range(count))
    return [Choice(*cut_text(text, stops, limit)) for text in texts]


def _top_logprobs(fields: Fields) -> int | None:
    """Return how many of the likeliest tokens are wanted in each place, None where no logprobs are."""
    top = fields.whole("top_logprobs", least=0, most=_MOST_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise wrong_value("top_logprobs", "only allowed when 'logprobs' is true.")
    return None


def _format(fields: Fields) -> Json:
    form = fields.mapping("response_format")
    inner = Fields(form).mapping("json_schema")
    return {"type": form.get("type"), "schema": inner.get("schema")}


def _head(call: Call, model: str, kind: str) -> Json:
    return {
        "id": call.id("chatcmpl-"),
        "object": kind,
        "created": CREATED,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_sandbox",
    }


def _whole(call: Call, choices: list[Choice], top: int | None) -> list[Json]:
    return [
        {
            "index": index,
            "message": _message(call, index, choice),
            "logprobs": chat_logprobs(choice.text, top) if choice.text else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]


def _message(call: Call, index: int, choice: Choice) -> Json:
    message: Json = {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []}
    if choice.tool_call is not None:
        message["content"] = None
        message["tool_calls"] = [_tool_call(call, index, choice.tool_call, choice.tool_call.input)]
    return message


def _tool_call(call: Call, index: int, tool_call: ToolCall, text: str) -> Json:
    kind, key = ("custom", "input") if tool_call.custom else ("function", "arguments")
    return {"id": call.id("call_", index), "type": kind, kind: {"name": tool_call.name, key: text}}


def _stream(call: Call, model: str, choices: list[Choice], usage: Json | None, top: int | None) -> Iterator[bytes]:
    """Yield the events; with `usage` every chunk has the key, null but in the last."""
    head = _head(call, model, "chat.completion.chunk")
    tail: Json = {} if usage is None else {"usage": None}
    for index, choice in enumerate(choices):
        for delta in _deltas(call, index, choice, at_most=max(4, PIECES_PER_STREAM // len(choices))):
            text = delta.get("content")
            logprobs = chat_logprobs(text, top) if text else None
            part = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            yield sse(head | {"choices": [part]} | tail)
        last = {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}
        yield sse(head | {"choices": [last]} | tail)
    if usage is not None:
        yield sse(head | {"choices": [], "usage": usage})
    yield DONE


def _deltas(call: Call, index: int, choice: Choice, *, at_most: int) -> Iterator[Json]:
    tool_call = choice.tool_call
    if tool_call is None:
        yield {"role": "assistant", "content": "", "refusal": None}
        yield from ({"content": piece} for piece in pieces_of(choice.text, at_most=at_most))
        return
    kind, key = ("custom", "input") if tool_call.custom else ("function", "arguments")
    first = {"index": 0} | _tool_call(call, index, tool_call, "")
    yield {"role": "assistant", "content": None, "tool_calls": [first], "refusal": None}
    for piece in pieces_of(tool_call.input, at_most=at_most):
        yield {"tool_calls": [{"index": 0, kind: {key: piece}}]}
