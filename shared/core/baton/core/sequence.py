"""A sequence of tokens that an engine computes: its specification, and its progress.

A request is what a client sent; each of its attempts is one sequence on one engine.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from baton.core.draft_policy import Acceptance
from baton.core.embedding import Pooling
from baton.core.errors import BatonError
from baton.core.hashing import block_hashes, root_hash
from baton.core.prompt_lookup import NgramIndex
from baton.core.sampling import SamplingParams, TokenLogprob


class Constraint(Protocol):
    """What an output must match. Its state follows from the tokens that it is shown."""

    @property
    def failure(self) -> BatonError | None:
        """Why no more masks can be made, if so: the sequence ends with it."""

    def mask(self, token_ids: abc.Sequence[int], drafts: abc.Sequence[int]) -> bytes | None:
        """Tokens that may follow a sequence's known tokens and some drafts, one bit per token.

        Bit `i % 8` of byte `i // 8` is token `i`. None once it has failed, and after drafts that
        are not allowed or end the output: nothing follows those.

        Args:
            token_ids: all known tokens, prompt included; those shown before lead them.
            drafts: tokens that are known only if accepted.
        """


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What an engine is asked to compute."""

    seq_id: str
    """f"{request_id}/{attempt}"."""
    token_ids: tuple[int, ...]
    """The prompt, and after a fail-over also what was produced so far."""
    sampling: SamplingParams
    max_tokens: int
    """Most output tokens, those of earlier attempts included."""
    num_output_tokens: int = 0
    """Trailing tokens of `token_ids` that are output of earlier attempts."""
    priority: int = 0
    """Higher goes first."""
    cache_salt: str = ""
    prefill_only: bool = False
    """Stop after the first token and keep the KV until it is released."""
    pooling: Pooling | None = None
    """Compute the prompt for its vector only; `max_tokens` is then not used."""
    # Each pass over a long prompt takes milliseconds: done once. `dataclasses.replace` begins anew.
    _token_range: list[int] = field(init=False, repr=False, compare=False, default_factory=list)
    _hashes: dict[bytes, tuple[bytes, ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def token_range(self) -> tuple[int, int]:
        """Lowest and highest of `token_ids`, of which there must be one."""
        if not self._token_range:
            self._token_range.extend((min(self.token_ids), max(self.token_ids)))
        return self._token_range[0], self._token_range[1]

    def block_hashes(self, digest: bytes, block_size: int) -> tuple[bytes, ...]:
        """Chained hashes of the full blocks of `token_ids`, for a fingerprint of this `digest`."""
        if digest not in self._hashes:
            root = root_hash(digest, self.cache_salt)
            self._hashes[digest] = tuple(block_hashes(root, self.token_ids, block_size))
        return self._hashes[digest]


class SequenceStatus(Enum):
    """Where a sequence is in an engine."""

    WAITING = "waiting"
    """To be computed here; holds blocks only if it was reserved first."""
    RESERVED = "reserved"
    """Holds blocks for KV that comes from elsewhere."""
    READY = "ready"
    """Its KV is here; it waits for a place in the batch."""
    RUNNING = "running"
    HELD = "held"
    """Prefill is done and its KV is kept for a hand-off."""
    ENDED = "ended"


_S = SequenceStatus
TRANSITIONS: frozenset[tuple[SequenceStatus, SequenceStatus]] = frozenset({
    (_S.WAITING, _S.RUNNING),
    (_S.RUNNING, _S.WAITING),
    (_S.RESERVED, _S.READY),
    (_S.RESERVED, _S.WAITING),
    (_S.READY, _S.RUNNING),
    (_S.RUNNING, _S.HELD),
    *((status, _S.ENDED) for status in _S if status is not _S.ENDED),
})


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one sequence. Not thread-safe: the engine's lock guards it."""

    spec: SequenceSpec
    order: int
    """Order of arrival at this engine."""
    arrived_at_s: float
    status: SequenceStatus
    token_ids: list[int] = field(init=False)
    """All known tokens; the KV of the last one is not computed while running."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the leading full blocks of `token_ids`, as far as computed."""
    matched_blocks: list[int] = field(default_factory=list)
    """Cached blocks that the last match found, when the pool had seen `matched_at` evictions."""
    matched_at: int = -1
    num_computed_tokens: int = 0
    """Leading tokens whose KV is in the blocks."""
    num_draft_computed_tokens: int = 0
    """The same for the draft model's KV."""
    num_published_blocks: int = 0
    """Leading blocks offered to the prefix cache."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was here at the first start: cached, or another sequence's."""
    copy_source: int | None = None
    """Another sequence's block, to be copied into the partly filled one before the first write."""
    has_started: bool = False
    num_pins: int = 0
    """Steps and transfers that touch the blocks right now: while any does, none is let go."""
    is_released: bool = False
    is_quarantined: bool = False
    """Once let go, the blocks are quarantined."""
    acceptance: Acceptance | None = None
    """Of its drafts, once there were any."""
    ngrams: NgramIndex | None = None
    """Where its drafts are looked up, if they are."""
    prompt_vocabulary: tuple[int, ...] = ()
    """The prompt's tokens, each once, where penalties need them."""
    constraint: Constraint | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as computed, where asked for."""
    hidden_sum: list[float] = field(default_factory=list)
    """Sum of the hidden states that are pooled, as far as computed."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.spec.token_ids)

    @property
    def seq_id(self) -> str:
        """Id of the sequence."""
        return self.spec.seq_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the request's prompt."""
        return len(self.spec.token_ids) - self.spec.num_output_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known, those of earlier attempts included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until the first output token, where they are asked for."""
        return self.spec.sampling.prompt_logprobs is not None and not self.num_output_tokens

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return len(self.token_ids)

    @property
    def is_computed_whole(self) -> bool:
        """True when cached KV does not help: it lacks the log-probabilities or states asked for."""
        return self.wants_prompt_logprobs or self.spec.pooling is Pooling.MEAN

    def add_hidden(self, values: abc.Sequence[float]) -> None:
        """Adds hidden states of a part of the prompt; nothing, if none of them is pooled."""
        pairs = zip(self.hidden_sum, values, strict=True) if self.hidden_sum and values else ()
        self.hidden_sum = [a + b for a, b in pairs] or self.hidden_sum or list(values)

    def transition(self, to: SequenceStatus) -> None:
        """Changes the status.

        Raises:
            ValueError: the transition is not legal (a defect).
        """
        if (self.status, to) not in TRANSITIONS:
            raise ValueError(f"{self.seq_id}: {self.status.value} to {to.value} is not legal")
        self.status = to

    def forget_kv(self) -> list[int]:
        """Drops the block table and all progress; returns the blocks, which the caller frees."""
        blocks, self.block_table = self.block_table, []
        if self.copy_source is not None:
            blocks.append(self.copy_source)
            self.copy_source = None
        self.prompt_logprobs.clear()
        self.hidden_sum = []
        self.num_computed_tokens = 0
        self.num_draft_computed_tokens = 0
        self.num_published_blocks = 0
        return blocks
