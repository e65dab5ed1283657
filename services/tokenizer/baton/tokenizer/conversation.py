"""A conversation as it comes in, turned into what chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from baton.core.errors import InvalidRequest


def read_message(
    role: str, content: str, tool_calls_json: str, tool_call_id: str, name: str
) -> dict[str, Any]:
    """A message with only the keys that it has: templates ask whether a key is there.

    Raises:
        InvalidRequest: the tool calls are not such.
    """
    message: dict[str, Any] = {"role": role, "content": content}
    if tool_calls_json:
        calls = read_array(tool_calls_json, "tool_calls")
        message["tool_calls"] = [_read_call(call) for call in calls]
    if tool_call_id:
        message["tool_call_id"] = tool_call_id
    if name:
        message["name"] = name
    return message


def read_array(text: str, field: str) -> list[Any]:
    """A JSON array; an empty text is an empty one.

    Raises:
        InvalidRequest: it is none.
    """
    if not text:
        return []
    value = _loads(text, field)
    if not isinstance(value, list):
        raise InvalidRequest(f"{field} must be a JSON array")
    return value


def _read_call(call: Any) -> dict[str, Any]:
    """OpenAI writes a call's arguments as a text of JSON; templates expect the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("an entry of tool_calls must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, "tool_calls.function.arguments") if arguments.strip() else {}
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _loads(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} is not JSON") from error
