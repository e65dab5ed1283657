"""Tools that a chat may use: the fields of its body, and what they mean for its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.client import Guide, InvalidRequest
from baton.gateway.call_reader import CallReader, NamedReader, Reader


class ToolFunction(BaseModel):
    """`tools[].function`. What else it holds is for the chat template."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """An entry of `tools`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(BaseModel):
    """`tool_choice.function`."""

    name: str


class ChosenTool(BaseModel):
    """`tool_choice` that names a tool."""

    type: Literal["function"]
    function: ChosenFunction


Choice = Literal["none", "auto", "required"] | ChosenTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools an answer may or must call."""

    tools: Sequence[Tool]
    choice: Choice
    is_parallel: bool

    @classmethod
    def of(
        cls, tools: Sequence[Tool] | None, choice: Choice | None, *, is_parallel: bool
    ) -> ToolUse:
        """What a body asks for.

        Raises:
            InvalidRequest: it must call a tool that there is not, or two have one name.
        """
        tools = tools or ()
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise InvalidRequest("tools must have different names")
        if isinstance(choice, ChosenTool) and choice.function.name not in names:
            raise InvalidRequest(f"tool_choice names {choice.function.name!r}, not one of tools")
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice 'required' needs tools")
        if choice == "none" or not tools:
            return cls((), "none", is_parallel)
        return cls(tools, choice or "auto", is_parallel)

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as they were given."""
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def guide(self) -> Guide | None:
        """What makes the answer a call, where it must be one.

        A named tool's answer is its arguments alone; "required" makes an array of calls.
        """
        if isinstance(self.choice, ChosenTool):
            name = self.choice.function.name
            [tool] = [tool for tool in self.tools if tool.function.name == name]
            return Guide.json_schema(_arguments(tool))
        if self.choice != "required":
            return None
        schema: dict[str, Any] = {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [_call(tool.function.name) for tool in self.tools]},
            "$defs": {tool.function.name: _moved(tool) for tool in self.tools},
        }
        if not self.is_parallel:
            schema["maxItems"] = 1
        return Guide.json_schema(schema)

    def reader(self) -> Callable[[], Reader] | None:
        """Makes what finds the calls in a text; None when there cannot be any."""
        if isinstance(self.choice, ChosenTool):
            name = self.choice.function.name
            return lambda: NamedReader(name)
        names = frozenset(tool.function.name for tool in self.tools)
        max_calls = None if self.is_parallel else 1
        return (lambda: CallReader(names, max_calls)) if names else None


def _arguments(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def _call(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(tool: Tool) -> Any:
    """The schema of a tool's arguments, its references following it to where it stands now."""
    return _with_references(_arguments(tool), f"#/$defs/{tool.function.name}")


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
