"""torch.nn.attention.varlen.varlen_attn in plain operators, for any device and dtype.

It has the signature of torch 2.13 and refuses what the kernel without further packages refuses.
"""

from __future__ import annotations

import torch

PAGE_MULTIPLE = 256


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Attention of each row of queries over its pages of keys."""
    assert return_aux is None
    assert cu_seq_k is not None, "FlashAttention 2 wants it for pages, too"
    assert seqused_k is not None
    assert block_table is not None
    for table in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert table.dtype is torch.int32
        assert table.device == query.device
        assert table.is_contiguous()
    assert num_splits == 1, "splitting leaves rows of paged batches unwritten"
    assert key.shape == value.shape
    assert key.shape[1] % PAGE_MULTIPLE == 0
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert query.stride(-1) == 1
    num_heads, num_kv_heads = query.shape[1], key.shape[2]
    assert enable_gqa or num_heads == num_kv_heads
    left, right = window_size
    output = torch.full_like(query, float("nan"))
    for row, num_keys in enumerate(seqused_k.tolist()):
        start, end = cu_seq_q[row : row + 2].tolist()
        assert 0 < end - start <= max_q
        assert 0 < num_keys <= max_k
        pages = block_table[row, : -(-num_keys // key.shape[1])].long()
        keys, values = (
            part[pages].flatten(0, 1)[:num_keys].repeat_interleave(num_heads // num_kv_heads, 1)
            for part in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[start:end], keys)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        # The last query is aligned with the last key.
        positions = torch.arange(num_keys - (end - start), num_keys, device=query.device)
        distance = torch.arange(num_keys, device=query.device) - positions.unsqueeze(1)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if right >= 0:
            hidden |= distance > right
        if left >= 0:
            hidden |= distance < -left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        output[start:end] = torch.einsum("hqk,khd->qhd", weights, values)
    return output


@torch.library.custom_op("baton_tests::varlen_attn", mutates_args=())
def operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window_size: list[int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int,
) -> torch.Tensor:
    """One operator for the recording, as the kernel is one for a graph."""
    return varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=(window_size[0], window_size[1]),
        enable_gqa=enable_gqa,
        seqused_k=seqused_k,
        block_table=block_table,
        num_splits=num_splits,
    )
