"""What the scheduler and its peers say to one another, as plain values: no protobuf here."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.embedding import Pooling
from baton.core.hashing import Fingerprint
from baton.core.sampling import FinishReason, SamplingParams, TokenLogprob
from baton.core.timeline import Slice


@dataclass(frozen=True, slots=True)
class WorkOrder:
    """What one attempt asks of its workers."""

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    """The prompt and what was produced so far."""
    num_output_tokens: int
    """How many of them were produced."""
    sampling: SamplingParams
    fingerprint: Fingerprint | None = None
    """What the decode worker computes with, as it announced it."""
    priority: int = 0
    cache_salt: str = ""
    fork_of: str = ""
    """Id of a request at the decode worker whose prompt's KV is to be shared."""


@dataclass(frozen=True, slots=True)
class EmbedOrder:
    """A prompt that a worker turns into a vector."""

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    pooling: Pooling
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where a prefill worker sends the KV."""

    worker_id: str
    reservation: Reservation


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room at a decode worker, under a lease."""

    reservation_id: str
    epoch: int
    """Fences out writes meant for an earlier reservation of the same blocks."""
    lease_s: float
    num_blocks: int
    num_cached_blocks: int
    push_address: str


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The prompt left the prefill worker's queue."""

    queue_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The prompt is computed."""

    token_id: int
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    stop_token_id: int | None
    compute_s: float
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, where asked for."""
    chunks: tuple[Slice, ...] = ()
    """That the prompt was computed in, relative to leaving the queue."""


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The prompt's KV is committed at the decode worker."""

    num_bytes: int
    num_blocks: int
    transfer_s: float
    exposed_s: float
    """Part of `transfer_s` after the first token."""
    idle_s: float
    """Part of `transfer_s` spent waiting for the computation."""


PrefillEvent = PrefillStarted | FirstToken | PrefillDone
