"""The tokens that a wide top-k or top-p keeps, found without sorting the vocabulary.

Tokens are counted into bins by their logits. Only the bin that holds the cutoff is looked at more
closely. Even a flat distribution over 150,000 tokens then takes a few passes instead of a sort.
"""

from __future__ import annotations

import torch

from baton.core.sampling import SamplingParams

_NUM_BINS = 1024
_NUM_SORTED = 1024
"""Up to this many tokens are sorted instead of put into bins."""
_UNIT = 2.0**34
"""Probabilities are whole numbers, relative to the largest one: sums of as many as a vocabulary has
are exact in float64, in whatever order a device adds them up."""


def kept_tokens(
    logits: torch.Tensor, scaled: torch.Tensor, sampling: SamplingParams
) -> torch.Tensor:
    """Which tokens of one row remain after top-k, then top-p. Ties go to lower ids.

    Args:
        logits: float32 [vocab_size]; their order is the order of the tokens.
        scaled: the logits divided by the temperature, shifted so that the largest is 0.
        sampling: the row's settings.

    Returns:
        bool [vocab_size], True for tokens that remain.
    """
    kept = logits.isfinite()
    if not kept.any():
        return kept
    if 0 < sampling.top_k < len(logits):
        kept = _leading(logits, kept, kept.double(), sampling.top_k)
    if sampling.top_p < 1.0:
        weights = scaled.double().exp_().mul_(_UNIT).round_().masked_fill_(~kept, 0.0)
        kept = _leading(logits, kept, weights, sampling.top_p * float(weights.sum()))
    return kept


def _leading(
    logits: torch.Tensor, allowed: torch.Tensor, weights: torch.Tensor, limit: float
) -> torch.Tensor:
    """The most likely allowed tokens, up to the one whose running weight reaches `limit`."""
    pool = allowed.nonzero().flatten()
    values, mass, before = logits[pool].double(), weights[pool], 0.0
    while len(pool) > _NUM_SORTED:
        highest = values.max()
        span = float(highest - values.min())
        if not span:
            break
        bins = (highest - values).mul_(_NUM_BINS / span).to(torch.int64).clamp_(max=_NUM_BINS - 1)
        ends = torch.bincount(bins, mass, _NUM_BINS).cumsum(0) + before
        cut = int((ends < limit).sum())
        if cut == _NUM_BINS:
            break
        before = float(ends[cut - 1]) if cut else before
        inside = (bins == cut).nonzero().flatten()
        values, pool, mass = values[inside], pool[inside], mass[inside]
    else:
        values, order = values.sort(descending=True, stable=True)
        pool, mass = pool[order], mass[order]
    # The pool is sorted, or it is equal tokens by their ids, or all of it is kept.
    kept = allowed & (logits > values.max())
    kept[pool[mass.cumsum(0) - mass + before < limit]] = True
    return kept
