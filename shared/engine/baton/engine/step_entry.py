"""One sequence's part of the step under way: what is computed for it, and the results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.core.batching import StepItem
from baton.core.sampling import TokenLogprob
from baton.core.sequence import Sequence as TokenSequence
from baton.engine.inputs import Row
from baton.engine.sampler import NO_TOKEN, Sampled


@dataclass(slots=True)
class StepEntry:
    """One sequence's part of the step under way; the sequence is pinned."""

    sequence: TokenSequence
    item: StepItem
    drafts: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    hidden_sum: list[float] = field(default_factory=list)

    @property
    def num_prompt_logits(self) -> int:
        """Known tokens whose successors' log-probabilities are asked for."""
        if not self.sequence.wants_prompt_logprobs:
            return 0
        return self.num_known - self.item.is_sampled

    @property
    def num_logits(self) -> int:
        """Rows of logits to sample from."""
        return 1 + len(self.drafts) if self.item.is_sampled else 0

    @property
    def num_known(self) -> int:
        """Known tokens computed."""
        return self.item.num_tokens - self.item.num_draft_tokens

    def num_complete_blocks(self, block_size: int) -> int:
        """Leading blocks that nothing is written to after this step, but for output."""
        end = self.item.start + self.num_known
        return -(-end // block_size) if self.item.is_sampled else end // block_size

    @property
    def has_nan(self) -> bool:
        """Whether what the model computed is not a number."""
        return math.isnan(sum(self.hidden_sum)) or any(
            sampled.token_id == NO_TOKEN for sampled in self.sampled
        )

    @property
    def row(self) -> Row:
        """What the model computes."""
        start = self.item.start
        known = self.sequence.token_ids[start : start + self.num_known]
        return Row(
            [*known, *self.drafts],
            start,
            self.sequence.block_table,
            self.num_logits,
            has_hidden=self.sequence.spec.pooling is not None,
            num_prompt_logits=self.num_prompt_logits,
        )
