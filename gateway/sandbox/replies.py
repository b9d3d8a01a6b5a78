"""What the sandbox says: friendly, deterministic, and with the user's own words in it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gateway.sandbox.fields import MOST_ITEMS, Fields, missing, too_many, wrong_type, wrong_value
from gateway.sandbox.schema import example_of
from gateway.sandbox.tokens import TOKENS_PER_ATTACHMENT, first_tokens, tokens_in
from gateway.sandbox.wire import encode

# Enough to recognise what was sent. Without a bound, `n` choices of a long message would fill the memory.
MOST_QUOTED_CHARACTERS = 4000

_KINDS = {
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio clip",
    "file": "file",
    "input_file": "file",
}
_TEXTS = ("text", "input_text", "output_text", "summary_text", "refusal")


@dataclass(frozen=True, slots=True)
class Said:
    """One message: who spoke, its text, what else was in it, and its tokens."""

    role: str
    text: str
    attachments: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return max(1, tokens_in(self.text)) + TOKENS_PER_ATTACHMENT * self.attachments.total()


def read_content(role: str, content: object, *, param: str) -> Said:
    """Return a message's content, given as text or as a list of typed parts; SandboxError 400 on `param`."""
    if content is None or isinstance(content, str):
        return Said(role, content or "")
    if not isinstance(content, list):
        raise wrong_type(param, "a string or an array", content)
    if len(content) > MOST_ITEMS:
        raise too_many(param, MOST_ITEMS)
    texts: list[str] = []
    attachments: Counter[str] = Counter()
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise wrong_type(f"{param}[{index}]", "an object", part)
        kind = str(part.get("type"))
        if kind in _TEXTS:
            text = part.get(kind, part.get("text", ""))
            if not isinstance(text, str):
                raise wrong_type(f"{param}[{index}].text", "a string", text)
            texts.append(text)
        else:
            attachments[_KINDS.get(kind, "other part")] += 1
    return Said(role, "\n".join(texts), attachments)


def read_messages(messages: list[Any]) -> list[Said]:
    """Return a chat's messages; SandboxError 400 names the one that is wrong."""
    said = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        if not isinstance(message, dict):
            raise wrong_type(param, "an object", message)
        role = message.get("role")
        if not isinstance(role, str):
            raise missing(f"{param}.role")
        if role not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise wrong_value(f"{param}.role", f"'{role[:100]}' is not a role.")
        said.append(read_content(role, message.get("content"), param=f"{param}.content"))
    return said


def last_asked(conversation: Sequence[Said]) -> Said:
    """Return what is to be answered: the last message of a user or a tool, or else the last of all."""
    for said in reversed(conversation):
        if said.role in ("user", "tool", "function"):
            return said
    return conversation[-1] if conversation else Said("user", "")


def reply_to(said: Said, model: str, *, index: int = 0, of: int = 1) -> str:
    """Return the answer's text; `index` of `of` tells the choices of one request apart."""
    verb = "The tool answered" if said.role in ("tool", "function") else "You said"
    lines = [f"{verb}: {quoted(said.text)}"]
    if said.attachments:
        lines.append("You also sent: " + ", ".join(f"{n} × {kind}" for kind, n in said.attachments.items()) + ".")
    choice = f" This is choice {index + 1} of {of}." if of > 1 else ""
    lines.append(
        f"This is the sandbox, answering in place of {model[:100]}: no network, no cost, "
        f"and the same answer to the same question.{choice}"
    )
    return "\n\n".join(lines)


def quoted(text: str) -> str:
    return text if len(text) <= MOST_QUOTED_CHARACTERS else text[:MOST_QUOTED_CHARACTERS] + "…"


def structured_reply(form: dict[str, Any], said: Said, *, param: str) -> str | None:
    """Return JSON text for a format of type json_object or json_schema, None for another.

    `form` is the object that has `type` and, for json_schema, `schema`; SandboxError 400 names it as `param`.
    """
    kind = form.get("type")
    if kind == "json_object":
        return encode({"you_said": quoted(said.text), "answered_by": "sandbox"}).decode()
    if kind != "json_schema":
        return None
    schema = form.get("schema")
    if schema is None:
        raise missing(f"{param}.schema")
    if not isinstance(schema, dict):
        raise wrong_type(f"{param}.schema", "an object", schema)
    return encode(example_of(schema, param=f"{param}.schema")).decode()


def stops_of(fields: Fields) -> list[str]:
    """Return the `stop` sequences, given as one text or up to 4 of them."""
    stop = fields.raw("stop")
    stops = [stop] if isinstance(stop, str) else stop
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise wrong_type("stop", "a string or an array of strings", stop)
    if len(stops) > 4:
        raise wrong_value("stop", "at most 4 sequences are allowed.", "array_above_max_length")
    return [item for item in stops if item]


def cut_text(text: str, stops: Sequence[str], limit: int | None) -> tuple[str, Literal["stop", "length"]]:
    """Return the text up to the first stop sequence and `limit` tokens, and why it ends there."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    if limit is not None and tokens_in(text) > limit:
        return first_tokens(text, limit), "length"
    return text, "stop"
