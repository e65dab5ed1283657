from __future__ import annotations

import pytest
import torch

from baton.engine import sdpa
from baton.engine.attention import AttentionOptions
from baton.engine.ragged import MAX_FOLDED_QUERIES, AttentionBatch, RowSpan
from baton.engine.sdpa import SdpaBackend

BLOCK_SIZE = 4
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8


def _rows(shapes: list[tuple[int, int]]) -> list[RowSpan]:
    """Rows with scattered blocks from (start, num_tokens)."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randperm(512, generator=generator).tolist()
    rows = []
    for start, num_tokens in shapes:
        count = -(-(start + num_tokens) // BLOCK_SIZE)
        rows.append(RowSpan(start, num_tokens, [blocks.pop() for _ in range(count)]))
    return sorted(rows, key=lambda row: row.sort_key)


def _plain(
    query: torch.Tensor,
    pool: tuple[torch.Tensor, torch.Tensor],
    rows: list[RowSpan],
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention token by token, in float64."""
    keys, values = (part.double().flatten(0, 1) for part in pool)
    outputs, token = [], 0
    for row in rows:
        for position in range(row.start, row.end):
            first = 0 if options.window is None else max(0, position - options.window + 1)
            slots = [
                row.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
                for p in range(first, position + 1)
            ]
            heads = []
            for head in range(NUM_HEADS):
                kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
                scores = keys[slots, kv_head] @ query[token, head].double() * options.scaling
                if options.softcap is not None:
                    scores = torch.tanh(scores / options.softcap) * options.softcap
                if options.sinks is not None:
                    scores = torch.cat([scores, options.sinks[head : head + 1].double()])
                weights = scores.softmax(0)[: len(slots)]
                heads.append(weights @ values[slots, kv_head])
            outputs.append(torch.stack(heads))
            token += 1
    return torch.stack(outputs)


SHAPES = [
    [(7, 1), (7, 1), (7, 1)],
    [(0, 1), (15, 1), (16, 1), (70, 1), (3, 1)],
    [(0, 30), (5, 1), (0, 3), (9, 3), (12, 40), (8, 1)],
    [(0, MAX_FOLDED_QUERIES), (0, MAX_FOLDED_QUERIES + 1), (31, 5), (30, 5)],
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 5, 16, 200])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
def test_equals_plain_attention(
    shapes: list[tuple[int, int]], window: int | None, extra: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (512, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    rows = _rows(shapes)
    num_tokens = sum(row.num_tokens for row in rows)
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator)
    options = AttentionOptions(
        scaling=0.3,
        window=window,
        softcap=2.0 if extra == "softcap" else None,
        sinks=torch.randn(NUM_HEADS, generator=generator) if extra == "sinks" else None,
    )
    batch = AttentionBatch(rows, BLOCK_SIZE, torch.device("cpu"))
    output = SdpaBackend().attend(query, keys, values, batch, options)
    torch.testing.assert_close(
        output.double(), _plain(query, (keys, values), rows, options), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("extra", ["none", "softcap"])
def test_nan_in_blocks_of_others_and_behind_a_rows_end_reaches_no_row(
    shapes: list[tuple[int, int]], extra: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = _rows(shapes)
    options = AttentionOptions(0.3, None, 2.0 if extra == "softcap" else None, None)
    query = torch.randn(sum(row.num_tokens for row in rows), NUM_HEADS, HEAD_DIM)
    clean = torch.zeros(2, 512 * BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    own = [
        row.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for row in rows
        for position in range(row.end)
    ]
    clean[:, own] = torch.randn(2, len(own), NUM_KV_HEADS, HEAD_DIM, generator=generator)
    dirty = torch.full_like(clean, torch.nan)
    dirty[:, own] = clean[:, own]
    found = []
    for pool in (clean, dirty):
        keys, values = pool.view(2, 512, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        batch = AttentionBatch(rows, BLOCK_SIZE, torch.device("cpu"))
        found.append(SdpaBackend().attend(query, keys, values, batch, options))
    assert torch.equal(*found)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("window", [None, 5])
def test_products_equal_the_fused_kernel_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int]], window: int | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (512, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    rows = _rows(shapes)
    num_tokens = sum(row.num_tokens for row in rows)
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=generator).bfloat16()
    options = AttentionOptions(scaling=0.3, window=window, softcap=None, sinks=None)
    expected = _plain(query, (keys, values), rows, options)
    for least in (0, 10**9):
        batch = AttentionBatch(rows, BLOCK_SIZE, torch.device("cpu"))
        monkeypatch.setattr(sdpa, "_has_amx", lambda: False)
        monkeypatch.setattr(sdpa, "_MIN_PRODUCT_KEYS", least)
        output = SdpaBackend().attend(query, keys, values, batch, options)
        torch.testing.assert_close(output.double(), expected, atol=3e-2, rtol=2e-2)


def test_rows_of_similar_context_share_a_group() -> None:
    rows = _rows([(start, 1) for start in (400, 390, 380, 30, 20)])
    batch = AttentionBatch(rows, BLOCK_SIZE, torch.device("cpu"))
    assert [group.num_rows for group in batch.groups(None)] == [3, 2]
    assert batch.groups(None) is batch.groups(None), "made once for all layers"


def test_a_window_gathers_no_blocks_behind_it() -> None:
    rows = _rows([(400, 1), (200, 1)])
    batch = AttentionBatch(rows, BLOCK_SIZE, torch.device("cpu"))
    (first, _) = batch.groups(8)
    assert first.num_keys <= 12


def test_tokens_go_to_their_slots() -> None:
    batch = AttentionBatch([RowSpan(3, 3, [9, 5])], BLOCK_SIZE, torch.device("cpu"))
    assert batch.slots.tolist() == [39, 20, 21]
