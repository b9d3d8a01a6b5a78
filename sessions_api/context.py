"""What of a conversation goes upstream: the newest turns that fit, after the operator's own prompt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What OpenAI's models add to each message, and to the beginning of the reply.
_MESSAGE_TOKENS = 4
_REPLY_TOKENS = 3
_SMALL_LETTERS = bytes(range(ord("a"), ord("z") + 1))


@dataclass(frozen=True, slots=True)
class Said:
    """One message as it is remembered; `tokens` are those of its content."""

    role: str
    content: str
    tokens: int


def estimated_tokens(text: str) -> int:
    """Return the tokens of a text, rather too many: about twice those of English or Chinese prose.

    Half a token for a small letter, nearly nothing for a blank, one for any other character of ASCII, five quarters for
    each of two bytes in UTF-8, two and a half for each of three (rare Chinese characters take as much), four for each
    of four (emoji). Letters and digits at random cost about what is returned.
    """
    plain = text.encode("ascii", "ignore")
    small = len(plain) - len(plain.translate(None, _SMALL_LETTERS))
    blanks = plain.count(b" ")
    of_four = len(text.encode("utf-16-le")) // 2 - len(text)
    of_two_or_three = len(text) - len(plain) - of_four
    of_three = len(text.encode()) - len(plain) - 4 * of_four - 2 * of_two_or_three
    of_two = of_two_or_three - of_three
    others = len(plain) - small - blanks
    return int(small / 2 + blanks / 8 + others + 1.25 * of_two + 2.5 * of_three + 4 * of_four) + 1


def messages_for(
    history: Sequence[Said], content: str, *, system_prompt: str, most_tokens: int, most_messages: int
) -> list[dict[str, str]]:
    """Return OpenAI's `messages`: the prompt, as much of the history as fits, and what is said now.

    The oldest turns are left out first, a question always with its answer. Prompt, `content` and a system message that
    the history begins with go up whatever they cost; `most_messages` counts the rest of the history alone.
    """
    spent = _REPLY_TOKENS + _cost(estimated_tokens(content))
    if system_prompt:
        spent += _cost(estimated_tokens(system_prompt))
    has_own_prompt = bool(history) and history[0].role == "system"
    own_prompt = list(history[:has_own_prompt])
    spent += sum(_cost(said.tokens) for said in own_prompt)
    kept: list[Said] = []
    for turn in reversed(_turns(history[has_own_prompt:])):
        spent += sum(_cost(said.tokens) for said in turn)
        if spent > most_tokens or len(kept) + len(turn) > most_messages:
            break
        kept[:0] = turn
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages += [{"role": said.role, "content": said.content} for said in own_prompt + kept]
    return [*messages, {"role": "user", "content": content}]


def _turns(history: Sequence[Said]) -> list[list[Said]]:
    """Return the history cut before each message of the user's."""
    turns: list[list[Said]] = []
    for said in history:
        if said.role == "user" or not turns:
            turns.append([])
        turns[-1].append(said)
    return turns


def _cost(tokens: int) -> int:
    return tokens + _MESSAGE_TOKENS
