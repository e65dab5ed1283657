"""Events that an engine reports about its sequences. Times are `time.monotonic()` seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton.core.errors import BatonError
from baton.core.sampling import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Started:
    """The sequence has a place in the batch. Sent once."""

    seq_id: str
    queued_s: float
    num_cached_tokens: int
    """Prompt tokens whose KV was in the prefix cache."""
    at_s: float


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """The first `num_blocks` blocks of a prefill-only sequence can be read."""

    seq_id: str
    num_blocks: int
    at_s: float


@dataclass(frozen=True, slots=True)
class LayersReady:
    """Of the first `num_blocks` blocks, the layers before `layer_end` can be read.

    Sent while the step that completes these blocks computes.
    """

    seq_id: str
    num_blocks: int
    layer_end: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """Output tokens of one step. The event with a finish reason is the last one."""

    seq_id: str
    token_index: int
    """Of the first token here, among all output tokens of the request."""
    token_ids: tuple[int, ...]
    """Empty only when a sequence ends with a token that came with its commit."""
    logprobs: tuple[TokenLogprob, ...]
    """One per token where asked for, else empty."""
    finish_reason: FinishReason | None
    stop_token_id: int | None
    """Stop or end-of-sequence token that ended it; it is the last of `token_ids`."""
    draft_tokens: int
    """Draft tokens proposed in this step."""
    accepted_tokens: int
    """Draft tokens among `token_ids`."""
    at_s: float
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first token where asked for: of the prompt's tokens from the second on."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """The prompt's vector. The last event: the sequence's blocks were released."""

    seq_id: str
    values: tuple[float, ...]
    at_s: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence ended in an error. The last event: its blocks were released."""

    seq_id: str
    error: BatonError


EngineEvent = Started | LayersReady | BlocksReady | Tokens | Embedded | Failed


@dataclass(frozen=True, slots=True)
class Grant:
    """Room for a sequence."""

    num_blocks: int
    """Blocks in its table, room for output included."""
    num_cached_blocks: int
    """Leading blocks whose KV is here already."""


@dataclass(frozen=True, slots=True)
class KvChange:
    """A change of the prefix cache. `removed` goes first."""

    sequence: int
    """Counts from 1 without gaps."""
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load and speed; speeds are 0 until measured."""

    num_running: int
    num_waiting: int
    """Waiting to be computed, or for a place in the batch."""
    num_reserved: int
    num_held: int
    queued_prefill_tokens: int
    """Prompt tokens not yet computed, of waiting and running sequences."""
    prefill_tokens_per_s: float
    decode_step_s: float
    counters: Mapping[str, float]
    """Totals since the start, by name."""
