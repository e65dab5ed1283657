"""The request bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from baton.gateway.chat_messages import Message


class TokenizeBody(BaseModel):
    """Body of POST /tokenize."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: Literal[True] | None = None


class DetokenizeBody(BaseModel):
    """Body of POST /detokenize."""

    model: str = ""
    tokens: list[int]
