"""The output of a request: batches of tokens, and its usage."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.sampling import FinishReason, TokenLogprob
from baton.core.timeline import Slice


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token's bytes and text."""

    token_bytes: bytes
    text: str
    """Incomplete UTF-8 is replaced."""


@dataclass(frozen=True, slots=True)
class DecodeTimings:
    """Times at the decode worker up to the first token that it made."""

    wait_for_kv_s: float
    queue_s: float
    first_step_s: float
    cached_tokens: int
    kv_chunks: tuple[Slice, ...] = ()
    """Chunks in which the KV arrived, relative to the reservation."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of one or more steps."""

    token_index: int
    """Of the first token here among the request's output tokens, over all attempts."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0
    timings: DecodeTimings | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the request's first token, where asked for."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in a cache, anywhere."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    response_cached: bool = False
    """True if no model ran: an identical request's kept answer was returned."""
