"""Conversations on the wire."""

from __future__ import annotations

from baton.core.prompt import Chat, ChatTurn
from baton.v1 import inference_pb2


def chat_to_pb(chat: Chat) -> inference_pb2.ChatPrompt:
    """The wire's form."""
    return inference_pb2.ChatPrompt(
        messages=[
            inference_pb2.ChatMessage(
                role=turn.role,
                content=turn.content,
                tool_calls_json=turn.tool_calls_json,
                tool_call_id=turn.tool_call_id,
                name=turn.name,
            )
            for turn in chat.turns
        ],
        tools_json=chat.tools_json,
    )


def chat_from_pb(pb: inference_pb2.ChatPrompt) -> Chat:
    """A conversation, not checked yet."""
    turns = (
        ChatTurn(
            role=message.role,
            content=message.content,
            tool_calls_json=message.tool_calls_json,
            tool_call_id=message.tool_call_id,
            name=message.name,
        )
        for message in pb.messages
    )
    return Chat(tuple(turns), pb.tools_json)
