"""From rows of integers to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from baton.engine.ragged import AttentionBatch, RowSpan


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's tokens in a forward."""

    token_ids: Sequence[int]
    start: int
    """Position of the first of them."""
    block_table: Sequence[int]
    num_logits: int
    """Trailing tokens whose logits are wanted."""
    has_hidden: bool = False
    """The final hidden states of its tokens are wanted, too."""
    num_prompt_logits: int = 0
    """Leading tokens whose logits are wanted besides, a few at a time."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tensors of one forward."""

    input_ids: torch.Tensor
    """int64 [1, num_tokens]."""
    position_ids: torch.Tensor
    """int64 [1, num_tokens]."""
    logits_index: torch.Tensor
    """Tokens whose logits are wanted, int64 [num_logits], in the order of the caller's rows."""
    batch: AttentionBatch
    ends: list[int]
    """End of each of the caller's rows among the tokens."""


def make_inputs(rows: Sequence[Row], block_size: int, device: torch.device) -> StepInputs:
    """Sorts and flattens rows."""
    spans = [RowSpan(row.start, len(row.token_ids), row.block_table) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: spans[index].sort_key)
    input_ids: list[int] = []
    position_ids: list[int] = []
    ends = [0] * len(rows)
    for index in order:
        input_ids.extend(rows[index].token_ids)
        position_ids.extend(range(spans[index].start, spans[index].end))
        ends[index] = len(input_ids)
    wanted = [
        token
        for row, end in zip(rows, ends, strict=True)
        for token in range(end - row.num_logits, end)
    ]
    return StepInputs(
        input_ids=torch.tensor([input_ids], dtype=torch.int64, device=device),
        position_ids=torch.tensor([position_ids], dtype=torch.int64, device=device),
        logits_index=torch.tensor(wanted, dtype=torch.int64, device=device),
        batch=AttentionBatch([spans[index] for index in order], block_size, device),
        ends=ends,
    )
