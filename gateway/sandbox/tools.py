"""Which tool a practice model would call, and with what. Pure.

Both ways of OpenAI to describe a tool are read. Chat completions nest it: `{"type": "function", "function":
{"name": …}}`; responses and realtime do not: `{"type": "function", "name": …}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.sandbox.fields import LONGEST_NAME, SandboxError, missing, wrong_type, wrong_value
from gateway.sandbox.replies import Said, quoted
from gateway.sandbox.schema import example_of
from gateway.sandbox.wire import encode

MOST_TOOLS = 128


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`input` is JSON for a function, and free text for a custom tool."""

    name: str
    input: str
    custom: bool


def call_for(tools: list[Any], choice: object, said: Said) -> ToolCall | None:
    """Return the call to the chosen or else the first tool; None when the answer shall be text.

    A tool is called when a user spoke last, so that its result, coming next, gets a text.
    SandboxError 400 when a tool is no tool, or the chosen one is not among them.
    """
    offered = [_described(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    callable_tools = [tool for tool in offered if tool["type"] in ("function", "custom")]
    if choice == "none" or said.role != "user" or not callable_tools:
        return None
    tool = _chosen(callable_tools, choice)
    if tool is None:
        return None
    if tool["type"] == "custom":
        return ToolCall(tool["name"], quoted(said.text), custom=True)
    schema = tool.get("parameters")
    arguments = example_of(schema, param="tools") if isinstance(schema, dict) else {}
    return ToolCall(tool["name"], encode(arguments).decode(), custom=False)


def _described(tool: object, param: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise wrong_type(param, "an object", tool)
    kind = tool.get("type")
    if not isinstance(kind, str):
        raise missing(f"{param}.type")
    nested = tool.get(kind)
    inner = nested if isinstance(nested, dict) else tool
    if kind in ("function", "custom"):
        name = inner.get("name")
        if not isinstance(name, str):
            raise missing(f"{param}.name")
        if len(name) > LONGEST_NAME:
            raise wrong_value(f"{param}.name", f"longer than {LONGEST_NAME} characters.", "string_above_max_length")
    return {**inner, "type": kind}


def _chosen(tools: list[dict[str, Any]], choice: object) -> dict[str, Any] | None:
    if not isinstance(choice, dict):
        return tools[0]
    kind = choice.get("type")
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        allowed = inner.get("tools") if isinstance(inner, dict) else None
        names = [_name_of(item) for item in allowed] if isinstance(allowed, list) else []
    elif kind in ("function", "custom"):
        names = [_name_of(choice)]
    else:
        return None  # a tool that OpenAI runs itself; the sandbox runs none
    for tool in tools:
        if tool["name"] in names:
            return tool
    raise SandboxError(
        400, "Tool choice names a function that is not in 'tools'.", param="tool_choice", code="invalid_value"
    )


def _name_of(choice: object) -> object:
    if not isinstance(choice, dict):
        return None
    nested = choice.get(str(choice.get("type")))
    return nested.get("name") if isinstance(nested, dict) else choice.get("name")
