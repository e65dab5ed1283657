"""KV rounded for its way to another worker only: both keep it as it is computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from baton.core.handoff.frames import Span
from baton.core.hashing import INT8_SCALE_BYTES, KvLayout
from baton.engine.kv_cache import torch_dtype
from baton.engine.kv_int8 import pack, unpack


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
