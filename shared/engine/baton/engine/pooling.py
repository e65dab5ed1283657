"""Hidden states of a prompt's parts to the sum that its vector is made of."""

from __future__ import annotations

import torch

from baton.core.embedding import Pooling


def pooled(hidden: torch.Tensor, pooling: Pooling, *, is_last: bool) -> list[float]:
    """The part of a sum that some tokens' states, [num_tokens, width], are.

    Empty when none of them is pooled.
    """
    if pooling is Pooling.MEAN:
        values: list[float] = hidden.double().sum(0).tolist()
        return values
    last: list[float] = hidden[-1].tolist() if is_last else []
    return last
