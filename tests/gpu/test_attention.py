"""torch's varlen kernel beside sdpa: the same numbers within what bfloat16 allows."""

from __future__ import annotations

import pytest
import torch

from baton.engine.attention import AttentionOptions
from baton.engine.ragged import AttentionBatch, RowSpan
from baton.engine.sdpa import SdpaBackend
from baton.engine.varlen import VarlenBackend, find_kernel

BLOCK_SIZE, NUM_BLOCKS = 256, 64
SHAPES = [
    [(0, 1), (255, 1), (256, 1), (2000, 1)],
    [(0, 30), (5, 1), (0, 300), (9, 3), (250, 40), (511, 2), (1500, 1)],
]


def _rows(shapes: list[tuple[int, int]]) -> list[RowSpan]:
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    rows = [
        RowSpan(start, num, [blocks.pop() for _ in range(-(-(start + num) // BLOCK_SIZE))])
        for start, num in shapes
    ]
    return sorted(rows, key=lambda row: row.sort_key)


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 100, 256, 5000])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (4, 4, 64), (8, 1, 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_is_close_to_sdpa_in_float32(
    shapes: list[tuple[int, int]],
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    keys, values = (_random(*shape, device=device, dtype=dtype) for _ in range(2))
    rows = _rows(shapes)
    num_tokens = sum(row.num_tokens for row in rows)
    query = _random(num_tokens, num_heads, head_dim, device=device, dtype=dtype)
    batch = AttentionBatch(rows, BLOCK_SIZE, device)
    options = AttentionOptions(scaling=head_dim**-0.5, window=window)
    expected = SdpaBackend().attend(query.float(), keys.float(), values.float(), batch, options)
    backend = VarlenBackend(find_kernel(device, dtype, BLOCK_SIZE))
    output = backend.attend(query, keys, values, batch, options)
    assert not output.isnan().any(), "every row is written"
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device) -> None:
    shape = (NUM_BLOCKS, BLOCK_SIZE, 8, 128)
    keys, values = (_random(*shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    rows = _rows(SHAPES[0])
    query = _random(len(rows), 32, 128, device=device, dtype=torch.bfloat16)
    backend = VarlenBackend(find_kernel(device, torch.bfloat16, BLOCK_SIZE))
    options = AttentionOptions(scaling=128**-0.5)
    together = backend.attend(
        query, keys, values, AttentionBatch(rows, BLOCK_SIZE, device), options
    )
    for index, row in enumerate(rows):
        batch = AttentionBatch([row], BLOCK_SIZE, device)
        alone = backend.attend(query[index : index + 1], keys, values, batch, options)
        assert torch.equal(alone[0], together[index])
