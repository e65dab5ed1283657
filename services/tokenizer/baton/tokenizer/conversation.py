"""A conversation as it comes in, turned into what chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.prompt import ChatTurn


def read_message(turn: ChatTurn) -> dict[str, Any]:
    """A message with only the keys that it has: templates ask whether a key is there.

    Raises:
        InvalidRequest: the tool calls cannot be read.
    """
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls_json:
        calls = read_array(turn.tool_calls_json, "tool_calls")
        message["tool_calls"] = [_read_call(call) for call in calls]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name:
        message["name"] = turn.name
    return message


def read_array(text: str, field: str) -> list[Any]:
    """A JSON array; an empty text is an empty one.

    Raises:
        InvalidRequest: it is something else.
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
