"""One sequence's part of the step under way, its results, and what can be read of it already.

A layer's KV is final once the layer's attention has written it, while the step goes on to other
layers. So a prompt that fits one step is on its way before its first token is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.core.batching import StepItem
from baton.core.hashing import KvLayout
from baton.core.sampling import TokenLogprob
from baton.core.sequence import Sequence as TokenSequence
from baton.engine.events import LayersReady
from baton.engine.inputs import Row
from baton.engine.sampler import NO_TOKEN, Sampled
from baton.engine.state import EngineState


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


def layer_news(
    state: EngineState, prompts: Sequence[StepEntry], layout: KvLayout
) -> Callable[[int], None] | None:
    """Reports a step's layers in groups of about `layer_group_bytes` of KV.

    Returns:
        A function that the engine thread calls with each layer whose KV the step has written.
        None if the step's KV is not more than one group.
    """
    group_bytes = state.config.layer_group_bytes
    size = layout.block_size
    # The step pins its sequences: their blocks stay theirs until it ends.
    blocks = [(e.sequence, e.item.start // size, e.num_complete_blocks(size)) for e in prompts]
    num_bytes = layout.block_bytes * sum(end - start for _, start, end in blocks)
    if group_bytes is None or num_bytes <= group_bytes:
        return None
    group = -(-layout.num_layers * group_bytes // num_bytes)
    num_written = 0

    def on_written(layer: int) -> None:
        nonlocal num_written
        if layer != num_written:
            return  # Out of order: readers learn of these layers when the step ends.
        num_written += 1
        if num_written % group and num_written < layout.num_layers:
            return
        now = time.monotonic()
        with state.lock:
            state.outbox += [
                LayersReady(sequence.seq_id, end, num_written, now)
                for sequence, start, end in blocks
                if end > start and not sequence.is_released
            ]
        state.deliver()

    return on_written
