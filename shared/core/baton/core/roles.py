"""The roles that a process can have."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """A service's role, as it is announced; the value is the wire's text."""

    GATEWAY = "gateway"
    TOKENIZER = "tokenizer"
    SCHEDULER = "scheduler"
    PREFILL = "prefill"
    DECODE = "decode"
    CACHE = "cache"
