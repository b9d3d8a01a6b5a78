"""POST /v1/moderations. A text with the word `sandbox-flag` in it is flagged as violence, no other is."""

from __future__ import annotations

from typing import Any

from gateway.sandbox.fields import MOST_ITEMS, missing, too_many, wrong_type
from gateway.sandbox.replies import read_content
from gateway.sandbox.shelf import Stock
from gateway.sandbox.wire import Answer, Call, Json, json_answer

TRIGGER = "sandbox-flag"

_TEXT_ONLY = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "sexual/minors",
)
_TEXT_AND_IMAGE = (
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "violence",
    "violence/graphic",
)
_CATEGORIES = _TEXT_ONLY + _TEXT_AND_IMAGE


def create(call: Call, stock: Stock) -> Answer:
    model = call.fields.model(default="omni-moderation-latest")
    results = [_result(text, images=images) for text, images in _inputs(call.fields.raw("input"))]
    return json_answer({"id": call.id("modr-"), "model": model, "results": results})


def _inputs(value: Any) -> list[tuple[str, bool]]:
    """Return (text, has images) for each input; a list of typed parts is one input."""
    if value is None or value == []:
        raise missing("input")
    if isinstance(value, str):
        return [(value, False)]
    if not isinstance(value, list):
        raise wrong_type("input", "a string or an array", value)
    if len(value) > MOST_ITEMS:
        raise too_many("input", MOST_ITEMS)
    if all(isinstance(item, str) for item in value):
        return [(item, False) for item in value]
    said = read_content("user", value, param="input")
    return [(said.text, bool(said.attachments))]


def _result(text: str, *, images: bool) -> Json:
    flagged = TRIGGER in text.lower()
    both = ["text", "image"] if images else ["text"]
    return {
        "flagged": flagged,
        "categories": {name: flagged and name == "violence" for name in _CATEGORIES},
        "category_scores": {name: 0.99 if flagged and name == "violence" else 0.001 for name in _CATEGORIES},
        "category_applied_input_types": {name: both if name in _TEXT_AND_IMAGE else ["text"] for name in _CATEGORIES},
    }
