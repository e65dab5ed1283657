from __future__ import annotations

import pytest
import torch

from baton.core.handoff.frames import KvEncoding, Span
from baton.core.hashing import KvLayout
from baton.engine.kv_cache import KvCache
from baton.engine.kv_int8 import pack, restore_kv, round_kv

CPU = torch.device("cpu")


def _rounded(cache: KvCache, span: Span) -> memoryview:
    # Not aligned, like what follows a frame's header.
    size = span.num_bytes(KvEncoding.INT8.layout(cache.layout))
    out = memoryview(bytearray(size + 1))[1:]
    block_ids = range(span.block_start, span.block_start + span.num_blocks)
    round_kv(cache.read(block_ids, span.layer_start, span.layer_end), cache.layout, span, out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_move_by_half_a_step_at_most(dtype: str) -> None:
    layout = KvLayout.one_group(4, dtype, (2, 1, 3), (8, 16, 6))
    source, target = KvCache(layout, 6, CPU), KvCache(layout, 6, CPU)
    for part in (*source.keys, *source.values):
        part.copy_(torch.randn(part.shape) * torch.rand(part.shape[:3]).unsqueeze(-1) * 100)
    source.keys[1][2, 1] = 0.0
    for span in (Span(0, 2, 1, 3), Span(2, 3, 1, 3)):
        payload = _rounded(source, span)
        content = restore_kv(payload.toreadonly(), layout, span)
        target.write(range(1, 4), span.layer_start, span.layer_end, content)
    for mine, theirs in zip(source.keys + source.values, target.keys + target.values, strict=True):
        step = mine[1:4].float().abs().amax(-1, keepdim=True) / 127
        error = (mine[1:4].float() - theirs[1:4].float()).abs()
        own_rounding = mine[1:4].float().abs() * torch.finfo(mine.dtype).eps
        assert (error <= step * 0.51 + own_rounding).all()
        assert error.any()
    assert not target.keys[1][2, 1].any()


def test_the_wires_form_is_that_of_a_pool_in_int8() -> None:
    layout = KvLayout.one_group(1, "float32", (2, 1), (2, 4))
    cache = KvCache(layout, 1, CPU)
    pool = KvCache(KvEncoding.INT8.layout(layout), 1, CPU)
    for part, packed in zip(cache.keys + cache.values, pool.keys + pool.values, strict=True):
        part.copy_(torch.randn(part.shape))
        packed.copy_(pack(part))
    assert _rounded(cache, Span(0, 2, 0, 1)) == pool.read([0], 0, 2)


def test_it_is_smaller() -> None:
    layout = KvLayout.one_group(16, "bfloat16", (8,) * 32, (128,) * 32)
    span = Span(0, 32, 0, 4)
    assert span.num_bytes(KvEncoding.INT8.layout(layout)) / span.num_bytes(layout) == 130 / 256
