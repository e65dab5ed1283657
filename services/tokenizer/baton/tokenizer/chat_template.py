"""A model's chat template (Jinja in a sandbox, as in transformers) and the messages that it takes.

Source: transformers 5.23, utils/chat_template_utils.py (`_compile_jinja_template`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.core.errors import InvalidRequest
from baton.core.prompt import ChatTurn

_REFUSALS = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError,
)  # fmt: skip
"""What a template that dislikes its input may raise."""


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for training; here it only passes its content on."""

    tags = {"generation"}  # noqa: RUF012 - so typed by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The content of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Thread-safe.

    Raises:
        InvalidRequest: the template is not valid Jinja (at construction).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            extensions=[_GenerationTag, loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidRequest(f"the chat template does not compile: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str:
        """The prompt of a conversation, with the generation prompt added.

        `tools` are those that the model may call, as in OpenAI's API.

        Raises:
            InvalidRequest: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except _REFUSALS as error:
            # The text of a TypeError or LookupError may quote the prompt; a template's own may not.
            reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {reason}"
            ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates call it so
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


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
