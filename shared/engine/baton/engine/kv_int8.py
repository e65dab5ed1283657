"""KV in 8 bits: whole numbers with a scale per token and head, side by side in the pool.

A vector of n values takes n + 2 bytes: the numbers, then the scale in bfloat16. Blocks move, hand
over and hash like any others.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from baton.core.errors import Unsupported
from baton.core.hashing import INT8_SCALE_BYTES, KvLayout

_MAX = 127
_SMALLEST_SCALE = 1e-30
"""Keeps vectors of zeros from being divided by 0."""


def int8_layout(layout: KvLayout) -> KvLayout:
    """The same KV in 8 bits.

    Raises:
        Unsupported: a layer's heads have an odd size, and scales would not be aligned.
    """
    for layer, head_dim in enumerate(layout.head_dim):
        if head_dim % INT8_SCALE_BYTES:
            raise Unsupported(
                f"kv_dtype int8 needs heads of even size; layer {layer} has {head_dim}"
            )
    return replace(layout, dtype="int8")


def pack(vectors: torch.Tensor) -> torch.Tensor:
    """[..., n] floats as int8 [..., n + 2]."""
    exact = vectors.float()
    scale = (exact.abs().amax(-1, keepdim=True) / _MAX).clamp_(min=_SMALLEST_SCALE).bfloat16()
    # Divided by what is stored, so that the scale's own rounding adds nothing.
    numbers = (exact / scale.float()).round_().clamp_(-_MAX, _MAX).to(torch.int8)
    return torch.cat([numbers, scale.view(torch.int8)], dim=-1)


def unpack(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `pack` was given, rounded, contiguous."""
    size = packed.shape[-1] - INT8_SCALE_BYTES
    scale = packed[..., size:].view(torch.bfloat16)
    # Small scales are out of float16's range.
    wide = torch.float32 if dtype is torch.float16 else dtype
    return (packed[..., :size].to(wide) * scale.to(wide)).to(dtype)
