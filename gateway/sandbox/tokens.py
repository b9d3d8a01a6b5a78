"""The sandbox's way to count tokens, and to cut a text into the pieces of a stream. Pure.

The rule, simple on purpose: a token is 4 bytes of UTF-8, rounded up per text; a message has at least 1; an
image or another attachment has 85. No tokenizer is asked: the numbers are near OpenAI's, not equal.
"""

from __future__ import annotations

import re

BYTES_PER_TOKEN = 4
TOKENS_PER_ATTACHMENT = 85

_SCRIPT_WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f\U00020000-\U0003ffff"
# A variation selector belongs to the ideograph before it. Emoji joined by U+200D stay whole: no space inside.
_PIECE = re.compile(
    f"(?:[{_SCRIPT_WITHOUT_SPACES}][\ufe00-\ufe0f\U000e0100-\U000e01ef]?){{1,2}}\\s*"
    f"|[^\\s{_SCRIPT_WITHOUT_SPACES}]+\\s*"
    "|\\s+"
)


def tokens_in(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def first_tokens(text: str, limit: int) -> str:
    """Return as much of the text as `limit` tokens hold, whole characters only."""
    head = text.encode()[: limit * BYTES_PER_TOKEN]
    return head.decode(errors="ignore")


def pieces_of(text: str, *, at_most: int) -> list[str]:
    """Return the text word by word, or some words a piece to stay at or under `at_most` pieces."""
    words = _PIECE.findall(text)
    per_piece = max(1, -(-len(words) // at_most))
    return ["".join(words[start : start + per_piece]) for start in range(0, len(words), per_piece)]
