"""What a model is asked to continue: text, a conversation, or token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str
    tool_calls_json: str = ""
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the tools that the model may call in it."""

    turns: tuple[ChatTurn, ...]
    tools_json: str = ""


Prompt = str | Chat | tuple[int, ...]
"""Text, a conversation, or token ids."""
