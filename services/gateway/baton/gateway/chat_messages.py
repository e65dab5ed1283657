"""The messages of a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from baton.client import InvalidRequest
from baton.gateway.unsupported_fields import refuse_unsupported


class ContentPart(BaseModel):
    """A part of a message's content."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def text(self, index: int) -> str:
        """The content as one text.

        Raises:
            InvalidRequest: a part is not text.
        """
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"messages[{index}].content: only parts of type 'text' are supported"
                )
        return "".join(part.text or "" for part in self.content)


def messages_for_sdk(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Converts messages to the SDK's form.

    Raises:
        InvalidRequest: a part is not text, or a field is not supported.
    """
    for index, message in enumerate(messages):
        refuse_unsupported(message.model_extra or {}, (), f"messages[{index}].")
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text(index),
            "tool_calls": message.tool_calls,
            "tool_call_id": message.tool_call_id,
            "name": message.name,
        }
        for index, message in enumerate(messages)
    ]
