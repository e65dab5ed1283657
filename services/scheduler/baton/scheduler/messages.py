"""What the scheduler and its peers say to one another, as plain values: no protobuf here."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.core.embedding import Pooling
from baton.core.hashing import Fingerprint
from baton.core.output import TokenText, Usage
from baton.core.prompt import Prompt
from baton.core.request import Stage
from baton.core.sampling import FinishReason, SamplingParams, TokenLogprob
from baton.core.timeline import Slice


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A checked request for one completion."""

    model: str
    prompt: Prompt
    sampling: SamplingParams
    request_id: str
    priority: int = 0
    cache_salt: str = ""
    keep_special_tokens: bool = False
    can_reuse_answer: bool = False
    """An answer kept of an identical request will do, and this one's may be kept."""
    fork_of: str = ""
    """Id of a request with the same prompt, whose KV is to be shared."""
    output_ids: tuple[int, ...] = ()
    """Output that the caller has already, from a call that broke."""
    num_output_chars: int = 0
    """Characters of its text that the caller has."""
    output_digest: bytes = b""
    """Fingerprint of what computed it; empty when the caller does not know."""


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


@dataclass(frozen=True, slots=True)
class PlacementTaken:
    """Where a request ran, and why."""

    prefill_worker_id: str
    decode_worker_id: str
    is_local: bool
    reason: str
    attempts: int
    decode_cached_tokens: int
    prefill_cached_tokens: int


NOWHERE = PlacementTaken(
    prefill_worker_id="",
    decode_worker_id="",
    is_local=False,
    reason="",
    attempts=0,
    decode_cached_tokens=0,
    prefill_cached_tokens=0,
)
"""The placement of what no worker computed."""


@dataclass(frozen=True, slots=True)
class OutputToken:
    """One token, of the output or the prompt, with its log-probabilities and texts."""

    token_id: int
    text: TokenText
    logprob: float
    top: tuple[OutputToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """What only a request's last message carries."""

    finish_reason: FinishReason
    stop_reason: str
    usage: Usage
    stages: tuple[Stage, ...]
    placement: PlacementTaken


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of the answer."""

    text: str
    token_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[OutputToken, ...] = field(default=())
    prompt_logprobs: tuple[OutputToken, ...] = ()
    ending: Ending | None = None
