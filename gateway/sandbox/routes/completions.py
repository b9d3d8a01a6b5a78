"""POST /v1/completions, the older text completion, streamed and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gateway.sandbox.fields import MOST_ITEMS, Fields, missing, too_many, wrong_type, wrong_value
from gateway.sandbox.logprobs import check_logprobs, completion_logprobs
from gateway.sandbox.replies import Said, cut_text, reply_to, stops_of
from gateway.sandbox.routes.chat import MOST_CHOICES, PIECES_PER_STREAM, usage_of
from gateway.sandbox.shelf import Stock
from gateway.sandbox.tokens import pieces_of, tokens_in
from gateway.sandbox.wire import CREATED, DONE, Answer, Call, Json, event_stream, json_answer, sse

_MOST_ECHOED_TOKENS = 500_000
_MOST_TOKENS_IN_LIST = 300_000
_MOST_TOP_LOGPROBS = 5
_Finished = tuple[str, str]  # text, finish_reason


def create(call: Call, stock: Stock) -> Answer:
    fields = call.fields
    model = fields.model()
    prompts = read_texts(fields.raw("prompt"), "prompt")
    count = fields.whole("n", least=1, most=MOST_CHOICES) or 1
    if len(prompts) * count > MOST_CHOICES:
        raise wrong_value("prompt", f"the sandbox gives at most {MOST_CHOICES} choices, prompts times n.")
    prompt_tokens = sum(max(1, tokens) for _, tokens in prompts)
    if fields.flag("echo") and prompt_tokens * count > _MOST_ECHOED_TOKENS:
        raise wrong_value("echo", f"the sandbox echoes at most {_MOST_ECHOED_TOKENS} tokens, prompts times n.")
    choices, completion_tokens = _choices(fields, model, prompts, count)
    usage = usage_of(prompt_tokens, completion_tokens)
    top = fields.whole("logprobs", least=0, most=_MOST_TOP_LOGPROBS)
    check_logprobs((text for text, _ in choices), top)
    if fields.flag("stream"):
        include_usage = bool(fields.mapping("stream_options").get("include_usage"))
        return event_stream(_stream(call, model, choices, usage if include_usage else None, top))
    whole = [
        _choice(index, text, reason, completion_logprobs(text, top)) for index, (text, reason) in enumerate(choices)
    ]
    return json_answer(_head(call, model) | {"choices": whole, "usage": usage})


def read_texts(value: object, name: str) -> list[tuple[str, int]]:
    """Return (text, tokens) for each input: a text, a list of texts, a list of token ids, or a list of those.

    Token ids are told as `<3 tokens>`: the sandbox has no tokenizer to turn them back.
    """
    if value is None or value in ("", []):
        raise missing(name)
    if isinstance(value, str):
        return [(value, tokens_in(value))]
    if isinstance(value, list):
        if len(value) > _MOST_TOKENS_IN_LIST:
            raise too_many(name, _MOST_TOKENS_IN_LIST)
        if all(_is_token(item) for item in value):
            return [_token_text(value)]
        if len(value) > MOST_ITEMS:
            raise too_many(name, MOST_ITEMS)
        if all(isinstance(item, str) for item in value):
            return [(item, tokens_in(item)) for item in value]
        if all(isinstance(item, list) and item and all(map(_is_token, item)) for item in value):
            return [_token_text(item) for item in value]
    raise wrong_type(name, "a string, an array of strings, or arrays of token ids", value)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_text(tokens: list[Any]) -> tuple[str, int]:
    return f"<{len(tokens)} tokens>", len(tokens)


def _choices(fields: Fields, model: str, prompts: list[tuple[str, int]], count: int) -> tuple[list[_Finished], int]:
    """Return the choices and what they cost; an echoed prompt is not counted again."""
    limit = fields.whole("max_tokens", least=0, most=10**9)
    stops = stops_of(fields)
    echo = fields.flag("echo")
    choices: list[_Finished] = []
    spent = 0
    for prompt, _ in prompts:
        for index in range(count):
            text, reason = cut_text(reply_to(Said("user", prompt), model, index=index, of=count), stops, limit)
            spent += tokens_in(text)
            choices.append((f"{prompt}\n\n{text}" if echo else text, reason))
    return choices, spent


def _head(call: Call, model: str) -> Json:
    return {
        "id": call.id("cmpl-"),
        "object": "text_completion",
        "created": CREATED,
        "model": model,
        "system_fingerprint": "fp_sandbox",
    }


def _choice(index: int, text: str, reason: str | None, logprobs: Json | None = None) -> Json:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def _stream(call: Call, model: str, choices: list[_Finished], usage: Json | None, top: int | None) -> Iterator[bytes]:
    head = _head(call, model)
    tail: Json = {} if usage is None else {"usage": None}
    for index, (text, reason) in enumerate(choices):
        offset = 0
        for piece in pieces_of(text, at_most=max(4, PIECES_PER_STREAM // len(choices))):
            logprobs = completion_logprobs(piece, top, offset=offset)
            yield sse(head | {"choices": [_choice(index, piece, None, logprobs)]} | tail)
            offset += len(piece)
        yield sse(head | {"choices": [_choice(index, "", reason)]} | tail)
    if usage is not None:
        yield sse(head | {"choices": [], "usage": usage})
    yield DONE
