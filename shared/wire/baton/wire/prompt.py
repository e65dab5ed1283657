"""Prompts on the wire."""

from __future__ import annotations

from typing import Any

from baton.core.prompt import Chat, ChatTurn, Prompt
from baton.v1 import inference_pb2
from baton.wire.fields import as_message, as_value


def chat_to_pb(chat: Chat) -> inference_pb2.ChatPrompt:
    """The wire's form."""
    messages = [as_message(inference_pb2.ChatMessage, turn) for turn in chat.turns]
    return inference_pb2.ChatPrompt(messages=messages, tools_json=chat.tools_json)


def chat_from_pb(pb: inference_pb2.ChatPrompt) -> Chat:
    """A conversation, not checked yet."""
    return Chat(tuple(as_value(ChatTurn, message) for message in pb.messages), pb.tools_json)


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """The field of a message's prompt, by its name."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, tuple):
        return {"tokens": inference_pb2.TokenPrompt(token_ids=prompt)}
    return {"chat": chat_to_pb(prompt)}
