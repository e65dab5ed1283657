from __future__ import annotations

import pytest
import torch

from baton.core.errors import Unsupported
from baton.core.hashing import Fingerprint, KvLayout
from baton.engine.kv_cache import KvCache
from baton.engine.kv_int8 import int8_layout, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 24, 64])
def test_each_vector_is_rounded_by_its_own_scale(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    vectors = torch.randn(5, 3, size, generator=generator)
    vectors *= torch.tensor([1e-4, 1.0, 100.0]).view(1, 3, 1)
    vectors[0, 0] = 0.0
    vectors = vectors.to(dtype)
    packed = pack(vectors)
    assert (packed.dtype, packed.shape) == (torch.int8, (5, 3, size + 2))
    found = unpack(packed, dtype)
    assert found.dtype is dtype
    largest = vectors.float().abs().amax(-1, keepdim=True)
    # Half a step of rounding, a scale rounded down, and the dtype's own rounding.
    assert ((found.float() - vectors.float()).abs() <= largest * (0.8 / 127 + 2**-8)).all()
    assert not found[0, 0].any()
    again = unpack(pack(found), dtype)
    assert torch.allclose(again.float(), found.float(), rtol=2e-2, atol=1e-6)


def test_blocks_have_about_half_the_bytes_of_16_bits() -> None:
    plain = KvLayout.one_group(16, "bfloat16", (8, 4), (64, 128))
    small = int8_layout(plain)
    assert plain.block_bytes == 2 * 16 * 2 * (8 * 64 + 4 * 128)
    assert small.block_bytes == 2 * 16 * (8 * 66 + 4 * 130)
    assert small.block_bytes / plain.block_bytes < 0.52
    cache = KvCache(small, 3, torch.device("cpu"))
    parts = [*cache.keys, *cache.values]
    assert sum(part.nbytes for part in parts) == cache.num_bytes == 3 * small.block_bytes
    payload = cache.read([1], 0, 2)
    assert payload.nbytes == small.block_bytes


def test_the_difference_is_told() -> None:
    plain = KvLayout.one_group(16, "bfloat16", (8,), (64,))
    one, other = (Fingerprint("m", "c", "w", "t", kind) for kind in (plain, int8_layout(plain)))
    assert one.differences(other) == ["dtype: bfloat16 != int8"]
    assert one.digest() != other.digest()


def test_heads_of_odd_size_are_refused() -> None:
    with pytest.raises(Unsupported, match="layer 1 has 63"):
        int8_layout(KvLayout.one_group(16, "bfloat16", (8, 8), (64, 63)))
