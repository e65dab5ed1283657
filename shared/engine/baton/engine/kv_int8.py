"""KV in 8 bits: whole numbers with a scale per token and head, side by side in the pool.

A vector of n values takes n + 2 bytes: the numbers, then the scale in bfloat16. Blocks move, hand
over and hash like any others.

Workers that keep KV as it is computed may still send it in this form: `round_kv` and `restore_kv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from baton.core.errors import Unsupported
from baton.core.handoff.frames import Span
from baton.core.hashing import INT8_SCALE_BYTES, KvLayout
from baton.engine.kv_cache import torch_dtype

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


def round_kv(content: memoryview, layout: KvLayout, span: Span, out: memoryview) -> None:
    """Puts a span's KV into `out` as a worker would send it that keeps KV in int8."""
    exact = torch.frombuffer(content, dtype=torch_dtype(layout.dtype))
    packed = torch.frombuffer(out, dtype=torch.int8)
    for vectors, target in _pairs(exact, packed, layout, span):
        target.copy_(pack(vectors))


def restore_kv(payload: memoryview, layout: KvLayout, span: Span) -> memoryview:
    """What `round_kv` was given, rounded. The payload has the right size: that was checked."""
    packed = torch.empty(payload.nbytes, dtype=torch.int8)  # aligned, which a frame's bytes are not
    packed.numpy()[:] = np.frombuffer(payload, dtype=np.int8)
    content = memoryview(np.empty(span.num_bytes(layout), dtype=np.uint8).data)
    exact = torch.frombuffer(content, dtype=torch_dtype(layout.dtype))
    for target, vectors in _pairs(exact, packed, layout, span):
        target.copy_(unpack(vectors, target.dtype))
    return content


def _pairs(
    exact: torch.Tensor, packed: torch.Tensor, layout: KvLayout, span: Span
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of each layer in both forms, one row per token and head."""
    exact_start = packed_start = 0
    for layer in range(span.layer_start, span.layer_end):
        dim = layout.head_dim[layer]
        num_rows = span.num_blocks * layout.block_size * layout.num_kv_heads[layer]
        for _ in "KV":
            exact_end = exact_start + num_rows * dim
            packed_end = packed_start + num_rows * (dim + INT8_SCALE_BYTES)
            yield (
                exact[exact_start:exact_end].view(num_rows, -1),
                packed[packed_start:packed_end].view(num_rows, -1),
            )
            exact_start, packed_start = exact_end, packed_end
