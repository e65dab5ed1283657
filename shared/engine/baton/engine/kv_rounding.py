"""KV as int8 with a scale per token and head: about half the bytes on the wire of bfloat16.

Rounding moves each value by at most half a step, a 254th of the largest value of its token and
head. The wire's form is described at KvEncoding in kv_transfer.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from baton.core.handoff import Span
from baton.core.hashing import KvLayout
from baton.engine.kv_cache import torch_dtype

_MAX = 127.0
_SCALE = np.dtype("<f4")


def round_kv(content: memoryview, layout: KvLayout, span: Span, out: memoryview) -> None:
    """Puts the wire's form of a span's KV into `out`, which has its size."""
    scales, values = _cut(out, layout, span)
    for (rows, place), (start, end) in zip(
        _tensors(content, layout, span), _bounds(layout, span), strict=True
    ):
        wide = rows.float()
        scale = wide.abs().amax(dim=1, keepdim=True) / _MAX
        # A row of zeros has scale 0 and stays zero.
        steps = wide / scale.clamp_min(torch.finfo(torch.float32).tiny)
        scales[start:end] = scale.view(-1).numpy()
        values[place] = steps.round_().to(torch.int8).view(-1).numpy()


def restore_kv(payload: memoryview, layout: KvLayout, span: Span) -> memoryview:
    """The KV of a payload in the wire's form, as it would be without rounding.

    The payload has its size: whoever received it has checked that.
    """
    scales, values = _cut(payload, layout, span)
    content = memoryview(np.empty(span.num_bytes(layout), dtype=np.uint8).data)
    for (rows, place), (start, end) in zip(
        _tensors(content, layout, span), _bounds(layout, span), strict=True
    ):
        steps = torch.from_numpy(values[place].astype(np.float32)).view(rows.shape)
        scale = torch.from_numpy(scales[start:end].astype(np.float32)).view(-1, 1)
        rows.copy_(steps.mul_(scale))
    return content


def _cut(payload: memoryview, layout: KvLayout, span: Span) -> tuple[np.ndarray, np.ndarray]:
    """Scales and values of a payload; it need not be aligned."""
    *_, (_, num_rows) = _bounds(layout, span)
    scales = np.frombuffer(payload, dtype=_SCALE, count=num_rows)
    return scales, np.frombuffer(payload, dtype=np.int8, offset=scales.nbytes)


def _shapes(layout: KvLayout, span: Span) -> Iterator[tuple[int, int]]:
    """Rows, one per token and head, and their length, of K and V of each layer."""
    for layer in range(span.layer_start, span.layer_end):
        num_rows = span.num_blocks * layout.block_size * layout.num_kv_heads[layer]
        yield num_rows, layout.head_dim[layer]
        yield num_rows, layout.head_dim[layer]


def _bounds(layout: KvLayout, span: Span) -> list[tuple[int, int]]:
    """Where each tensor's rows begin and end among all rows."""
    bounds, start = [], 0
    for num_rows, _ in _shapes(layout, span):
        bounds.append((start, start + num_rows))
        start += num_rows
    return bounds


def _tensors(
    content: memoryview, layout: KvLayout, span: Span
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Each tensor of native KV as `[num_rows, head_dim]`, and the place of its int8 values."""
    flat = torch.frombuffer(content, dtype=torch_dtype(layout.dtype))
    start = 0
    for num_rows, dim in _shapes(layout, span):
        end = start + num_rows * dim
        yield flat[start:end].view(num_rows, dim), slice(start, end)
        start = end
