"""The tools of a chat request, and what they demand of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.guide import Guide
from baton.core.toolcalls.parser import AnswerParser, ForcedCallParser, ToolCallParser

ToolDefinition = Mapping[str, Any]
"""A tool as OpenAI's API describes it: {"type": "function", "function": {"name": ..., ...}}."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools an answer may call, and whether it must call one."""

    tools: Sequence[ToolDefinition]
    """Empty when the answer may call none."""
    is_required: bool
    """The answer must consist of calls."""
    forced_name: str
    """The one tool that the answer must call; empty for any."""
    is_parallel: bool
    """The answer may hold more than one call."""

    @classmethod
    def of(
        cls,
        tools: Sequence[ToolDefinition],
        *,
        choice: str = "auto",
        forced_name: str = "",
        is_parallel: bool = True,
    ) -> ToolUse:
        """Checks the tools of a request; `choice` is "auto", "none" or "required".

        Raises:
            InvalidRequest: the request demands a call of a tool it does not list, or two tools
                share a name.
        """
        names = [_name(tool) for tool in tools]
        if len(set(names)) < len(names):
            raise InvalidRequest("tools must have different names")
        if forced_name and forced_name not in names:
            raise InvalidRequest(f"tool_choice names {forced_name!r}, not one of tools")
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice 'required' needs tools")
        usable = () if choice == "none" else tools
        return cls(usable, choice == "required", forced_name, is_parallel)

    def guide(self) -> Guide | None:
        """The schema that forces a call; None when the answer is free.

        A forced tool's answer is its arguments alone; a required call makes an array of calls.
        """
        if self.forced_name:
            [forced] = [tool for tool in self.tools if _name(tool) == self.forced_name]
            return Guide.json_schema(_arguments_schema(forced))
        if not self.is_required:
            return None
        schema: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_call_schema(_name(tool)) for tool in self.tools]},
            "$defs": {_name(tool): _relocated_schema(tool) for tool in self.tools},
        }
        if not self.is_parallel:
            schema["maxItems"] = 1
        return Guide.json_schema(schema)

    def parser_factory(self) -> Callable[[], AnswerParser] | None:
        """Makes one parser per answer; None when an answer cannot hold calls."""
        if self.forced_name:
            return lambda: ForcedCallParser(self.forced_name)
        names = frozenset(_name(tool) for tool in self.tools)
        max_calls = None if self.is_parallel else 1
        return (lambda: ToolCallParser(names, max_calls)) if names else None


def _name(tool: ToolDefinition) -> str:
    return str(tool["function"]["name"])


def _arguments_schema(tool: ToolDefinition) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object"}


def _call_schema(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _relocated_schema(tool: ToolDefinition) -> Any:
    """The schema of a tool's arguments, with its references moved below `$defs`."""
    return _with_references(_arguments_schema(tool), f"#/$defs/{_name(tool)}")


def _with_references(value: Any, root: str) -> Any:
    if isinstance(value, list):
        return [_with_references(item, root) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _with_references(item, root) for key, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference.removeprefix("#")
    return moved
