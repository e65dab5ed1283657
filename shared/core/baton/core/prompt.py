"""What a model is asked: text, a conversation, or token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str
    tool_calls_json: str = ""
    """The calls that the model made, as OpenAI writes them."""
    tool_call_id: str = ""
    """The call that a tool's message answers."""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the tools that the model may call in it."""

    turns: tuple[ChatTurn, ...]
    tools_json: str = ""


TextPrompt = str | Chat
"""A prompt that a tokenizer has to encode."""
Prompt = TextPrompt | tuple[int, ...]
"""Any prompt; a tuple holds token ids."""
