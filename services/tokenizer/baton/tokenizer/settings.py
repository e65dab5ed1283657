"""Settings of the tokenizer service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from baton.core.roles import Role
from baton.rpc.settings import ServiceSettings


class TokenizerSettings(ServiceSettings):
    """Settings of the tokenizer service."""

    role: ClassVar[str] = Role.TOKENIZER
    watches: ClassVar[frozenset[str] | None] = frozenset()

    models: str = ""
    """Directories with `tokenizer.json`: one path, or "name=path,name=path", where a backslash
    keeps a "," or "=" from separating; the last part of a path without a name is its name."""
    max_text_chars: int = Field(default=2_000_000, ge=1)
    """Longest text, or sum of a conversation's messages, to encode."""
    max_token_ids: int = Field(default=1_000_000, ge=1)
    """Most token ids to turn into text in one message."""
    max_chat_messages: int = Field(default=4096, ge=1)
    """Most messages of one conversation."""
    max_open_outputs: int = Field(default=8192, ge=1)
    """Most outputs open at once within one StreamText call."""
    encode_threads: int = Field(default=2, ge=1, le=64)
    """Threads for long texts, so that short ones and streams do not wait for them."""

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: str) -> str:
        parse_models(value)
        return value


def parse_models(text: str) -> dict[str, Path]:
    """Directories by model name.

    Raises:
        ValueError: an entry has no path, or a name appears twice.
    """
    models: dict[str, Path] = {}
    for entry in filter(None, (part.strip() for part in re.split(r"(?<!\\),", text))):
        is_path = entry.startswith(("/", "~", "."))
        parts = [entry] if is_path else re.split(r"(?<!\\)=", entry, maxsplit=1)
        *names, path = (re.sub(r"\\([,=])", r"\1", part.strip()) for part in parts)
        directory = Path(path).expanduser()
        name = names[0] if names else directory.resolve().name
        if not name or not path:
            raise ValueError(f"must look like 'name=path,name=path' or one path, got {entry!r}")
        if name in models:
            raise ValueError(f"names the model {name!r} twice")
        models[name] = directory
    return models
