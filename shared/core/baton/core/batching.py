"""What the engine's next step computes: integers in, integers out.

One step advances many sequences by some tokens each. Decoding sequences come first, one token and
their drafts each; prompts fill the rest of the token budget, chunk by chunk. When a decoding
sequence finds no block, the least important running one is preempted: it gives its blocks back and
is computed again later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that could take part in the next step."""

    seq_id: str
    num_tokens: int
    """Known tokens."""
    num_computed_tokens: int
    """Leading tokens with KV; for a waiting sequence those that its cached prefix would give."""
    num_blocks: int
    """Blocks in its table, or that its cached prefix would put there."""
    priority: int = 0
    order: int = 0
    num_draft_tokens: int = 0
    """Most draft tokens to verify; only for a sequence with one uncomputed token."""
    num_private_blocks: int = 0
    """Blocks that preempting it makes available."""
    num_revived_blocks: int = 0
    """Cached blocks without another user that it takes when it is admitted."""
    is_preemptible: bool = True

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens without KV."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts the most important first."""
        return -self.priority, self.order


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Room for one step."""

    max_num_batched_tokens: int
    max_num_seqs: int
    block_size: int
    num_available_blocks: int


@dataclass(frozen=True, slots=True)
class StepItem:
    """One sequence's part of a step."""

    seq_id: str
    start: int
    """Position of the first token computed."""
    num_tokens: int
    """Tokens computed, drafts included."""
    num_draft_tokens: int
    num_new_blocks: int
    """Blocks to allocate first."""
    is_admitted: bool
    """It was waiting."""
    is_sampled: bool
    """Its last known token is computed, so that the next one can be chosen."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step does, in this order: preempt, allocate, compute."""

    items: tuple[StepItem, ...] = ()
    preempted_seq_ids: tuple[str, ...] = ()


def plan_step(
    running: Iterable[Candidate], waiting: Iterable[Candidate], limits: StepLimits
) -> StepPlan:
    """Plans one step: never more tokens, sequences or blocks than `limits` has."""
    planner = _Planner(sorted(running, key=lambda candidate: candidate.rank), limits)
    planner.plan_running()
    if not planner.preempted:
        planner.admit(sorted(waiting, key=lambda candidate: candidate.rank))
    return StepPlan(tuple(planner.items.values()), tuple(planner.preempted))


class _Planner:
    def __init__(self, running: Sequence[Candidate], limits: StepLimits) -> None:
        self.items: dict[str, StepItem] = {}
        self.preempted: list[str] = []
        self._running = list(running)
        self._limits = limits
        self._num_left = limits.max_num_batched_tokens
        self._num_available = limits.num_available_blocks

    def plan_running(self) -> None:
        decoding = [item for item in self._running if item.num_uncomputed_tokens == 1]
        computing = [item for item in self._running if item.num_uncomputed_tokens > 1]
        for index, candidate in enumerate(decoding):
            # Every sequence gets its token before any sequence gets drafts.
            num_later = len(decoding) - index - 1
            room = max(1, self._num_left - num_later)
            self._extend(candidate, min(1 + candidate.num_draft_tokens, room))
        for candidate in computing:
            self._extend(candidate, candidate.num_uncomputed_tokens)

    def admit(self, waiting: Sequence[Candidate]) -> None:
        """Admits in order. Behind a candidate that lacks blocks, none that needs blocks passes."""
        num_running = len(self._running)
        is_blocked = False
        for candidate in waiting:
            if num_running >= self._limits.max_num_seqs or self._num_left <= 0:
                return
            # All of a prompt's blocks at once, so that a prompt never stops half-way for lack of
            # blocks; and one block left for each running sequence, so that the newcomer is not
            # preempted at once.
            need = self._num_missing(candidate, candidate.num_tokens)
            cost = need + candidate.num_revived_blocks
            if cost and (is_blocked or cost + num_running > self._num_available):
                is_blocked = True
                continue
            self._num_available -= cost
            num_running += 1
            num_tokens = min(candidate.num_uncomputed_tokens, self._num_left)
            self._add(candidate, num_tokens, need, is_admitted=True)

    def _extend(self, candidate: Candidate, num_tokens: int) -> None:
        num_tokens = min(num_tokens, self._num_left)
        if num_tokens <= 0 or candidate.seq_id in self.preempted:
            return
        end = candidate.num_computed_tokens + num_tokens
        need = self._num_missing(candidate, end)
        if need > self._num_available and num_tokens > candidate.num_uncomputed_tokens:
            num_tokens = candidate.num_uncomputed_tokens
            need = self._num_missing(candidate, candidate.num_computed_tokens + num_tokens)
        while need > self._num_available:
            victim = next((item for item in reversed(self._running) if item.is_preemptible), None)
            if victim is None:
                return
            self._preempt(victim)
            if victim is candidate:
                return
        self._num_available -= need
        self._add(candidate, num_tokens, need, is_admitted=False)

    def _preempt(self, victim: Candidate) -> None:
        self._running.remove(victim)
        self.preempted.append(victim.seq_id)
        self._num_available += victim.num_private_blocks
        item = self.items.pop(victim.seq_id, None)
        if item is not None:
            self._num_left += item.num_tokens
            self._num_available += item.num_new_blocks

    def _add(
        self, candidate: Candidate, num_tokens: int, num_new_blocks: int, *, is_admitted: bool
    ) -> None:
        self._num_left -= num_tokens
        num_draft_tokens = max(0, num_tokens - candidate.num_uncomputed_tokens)
        end = candidate.num_computed_tokens + num_tokens
        self.items[candidate.seq_id] = StepItem(
            seq_id=candidate.seq_id,
            start=candidate.num_computed_tokens,
            num_tokens=num_tokens,
            num_draft_tokens=num_draft_tokens,
            num_new_blocks=num_new_blocks,
            is_admitted=is_admitted,
            is_sampled=end >= candidate.num_tokens,
        )

    def _num_missing(self, candidate: Candidate, num_tokens: int) -> int:
        num_blocks = -(-num_tokens // self._limits.block_size)
        return max(0, num_blocks - candidate.num_blocks)
