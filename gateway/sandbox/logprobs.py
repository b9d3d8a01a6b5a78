"""How likely each token of an answer was: made up, and the same for the same token. Pure.

A token is here the smallest piece of a stream, so that streamed and whole answers say the same of the same text.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

from gateway.sandbox.fields import wrong_value
from gateway.sandbox.tokens import pieces_of
from gateway.sandbox.wire import Json

# Each costs far more memory than the token it is of.
_MOST_LOGPROBS = 50_000


def check_logprobs(texts: Iterable[str], top: int | None) -> None:
    """SandboxError 400 where there would be so many that they fill the memory."""
    if top is not None and sum(len(_tokens_of(text)) for text in texts) * (1 + top) > _MOST_LOGPROBS:
        raise wrong_value("logprobs", f"the sandbox gives at most {_MOST_LOGPROBS} in one answer.")


def chat_logprobs(text: str, top: int | None) -> Json | None:
    """Return what a choice of chat, or a piece of one, says of its text with `top` of the likeliest; None for None."""
    if top is None:
        return None
    content = [
        _described(token, _logprob_of(token))
        | {"top_logprobs": [_described(*one) for one in _likeliest(token, top).items()]}
        for token in _tokens_of(text)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(text: str, top: int | None, *, offset: int = 0) -> Json | None:
    """Return the same in the older form; `offset` is where the text begins, in characters."""
    if top is None:
        return None
    tokens = _tokens_of(text)
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_logprob_of(token) for token in tokens],
        "top_logprobs": [_likeliest(token, top) for token in tokens] if top else None,
        "text_offset": offsets[: len(tokens)],
    }


def _tokens_of(text: str) -> list[str]:
    return pieces_of(text, at_most=max(1, len(text)))


def _logprob_of(token: str) -> float:
    return -0.01 - zlib.crc32(token.encode()) % 500 / 1000


def _likeliest(token: str, top: int) -> dict[str, float]:
    """Return so many tokens that could stand in its place, itself first: together no likelier than 1."""
    chosen = _logprob_of(token)
    rest = -math.expm1(chosen)
    others = {token.rstrip() + "?" * rank: math.log(rest / 2**rank) for rank in range(1, top)}
    return {token: chosen} | others if top else {}


def _described(token: str, logprob: float) -> Json:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
