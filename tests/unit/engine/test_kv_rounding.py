from __future__ import annotations

import struct

import pytest
import torch

from baton.core.handoff import KvEncoding, Span
from baton.core.hashing import KvLayout
from baton.engine.kv_cache import KvCache
from baton.engine.kv_rounding import restore_kv, round_kv

CPU = torch.device("cpu")


def _rounded(cache: KvCache, span: Span) -> memoryview:
    # Not aligned, like what follows a frame's header.
    size = span.num_bytes(cache.layout, KvEncoding.INT8)
    out = memoryview(bytearray(size + 1))[1:]
    block_ids = range(span.block_start, span.block_start + span.num_blocks)
    round_kv(cache.read(block_ids, span.layer_start, span.layer_end), cache.layout, span, out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_move_by_half_a_step_at_most(dtype: str) -> None:
    layout = KvLayout(4, dtype, (2, 1, 3), (8, 16, 5))
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
        assert (error <= step * 0.501 + own_rounding).all()
        assert error.any()
    assert not target.keys[1][2, 1].any()


def test_the_wires_form_is_scales_then_values() -> None:
    layout = KvLayout(1, "float32", (2,), (2,))
    cache = KvCache(layout, 1, CPU)
    cache.keys[0][0, 0] = torch.tensor([[127.0, -1.0], [0.0, 0.0]])
    cache.values[0][0, 0] = torch.tensor([[254.0, 2.0], [-12.7, 0.1]])
    payload = _rounded(cache, Span(0, 1, 0, 1))
    assert struct.unpack("<4f8b", payload) == pytest.approx((
        1.0,
        0.0,
        2.0,
        0.1,
        127,
        -1,
        0,
        0,
        127,
        1,
        -127,
        1,
    ))


def test_it_is_smaller() -> None:
    layout = KvLayout(16, "bfloat16", (8,) * 32, (128,) * 32)
    span = Span(0, 32, 0, 4)
    assert span.num_bytes(layout, KvEncoding.INT8) / span.num_bytes(layout) == 132 / 256
