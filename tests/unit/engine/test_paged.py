from __future__ import annotations

import pytest
import torch

from baton.core.errors import Internal
from baton.engine import backends, sdpa
from baton.engine.attention import AttentionOptions, LayerShape
from baton.engine.kernels import find_library
from baton.engine.kv_int8 import pack
from baton.engine.paged import PagedBackend
from baton.engine.ragged import MAX_FOLDED_QUERIES, AttentionBatch, RowSpan
from baton.engine.sdpa import SdpaBackend

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(find_library() is None, reason="no kernels for this CPU")


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where this kernel is used: it runs on CPUs with AMX, too."""
    found = {**torch.cpu.get_capabilities(), "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


SHAPES = [
    [(7, 1)],
    [(0, 1), (15, 1), (31, 1), (32, 1), (70, 1), (300, 1)],
    [(0, 30), (5, 1), (0, 3), (40, 3), (12, 40), (8, 1), (90, 5)],
    [(0, MAX_FOLDED_QUERIES), (0, MAX_FOLDED_QUERIES + 1), (31, 5), (30, 5)],
    [(0, 20), (5, 40)],
]
# Heads, KV heads, size of a head, tokens in a block.
HEADS = [(6, 2, 64, 16), (14, 2, 64, 4), (4, 4, 32, 5), (8, 1, 256, 16), (3, 1, 96, 32)]


def _rows(shapes: list[tuple[int, int]], block_size: int) -> list[RowSpan]:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randperm(256, generator=generator).tolist()
    rows = []
    for start, num_tokens in shapes:
        count = -(-(start + num_tokens) // block_size)
        rows.append(RowSpan(start, num_tokens, [blocks.pop() for _ in range(count)]))
    return sorted(rows, key=lambda row: row.sort_key)


def _pools(
    heads: tuple[int, int, int, int], rows: list[RowSpan]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query and pools; what no row has computed is NaN."""
    num_heads, num_kv_heads, head_dim, block_size = heads
    generator = torch.Generator().manual_seed(1)
    pools = torch.full((2, 256, block_size, num_kv_heads, head_dim), torch.nan)
    for row in rows:
        for position in range(row.end):
            place = row.block_table[position // block_size], position % block_size
            pools[:, place[0], place[1]] = torch.randn(
                2, num_kv_heads, head_dim, generator=generator
            )
    num_tokens = sum(row.num_tokens for row in rows)
    query = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    return query.bfloat16(), pools[0].bfloat16(), pools[1].bfloat16()


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest of any token's head, of the length of what was wanted."""
    difference = (found.float() - wanted).norm(dim=-1)
    return float((difference / wanted.norm(dim=-1).clamp(min=0.3)).max())


def _options(extra: str, window: int | None, num_heads: int) -> AttentionOptions:
    sinks = torch.randn(num_heads, generator=torch.Generator().manual_seed(2))
    return AttentionOptions(
        scaling=0.2,
        window=window,
        softcap=2.0 if extra == "softcap" else None,
        sinks=sinks.bfloat16() if extra == "sinks" else None,
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 5, 33])
@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
def test_equals_gathered_attention_in_float32(
    heads: tuple[int, int, int, int], shapes: list[tuple[int, int]], window: int | None, extra: str
) -> None:
    rows = _rows(shapes, heads[3])
    query, keys, values = _pools(heads, rows)
    options = _options(extra, window, heads[0])
    found = PagedBackend().attend(query, keys, values, AttentionBatch(rows, heads[3], CPU), options)
    exact = [part.float().nan_to_num() for part in (query, keys, values)]
    wanted = SdpaBackend().attend(*exact, AttentionBatch(rows, heads[3], CPU), options)
    assert _error(found, wanted) < 0.02


@pytest.mark.parametrize("extra", ["none", "softcap", "sinks"])
@pytest.mark.parametrize("position", [0, 20, 39])
def test_nan_in_a_key_that_is_seen_is_not_hidden(extra: str, position: int) -> None:
    heads = HEADS[0]
    rows = _rows([(39, 1), (30, 1)], heads[3])
    query, keys, values = _pools(heads, rows)
    place = rows[0].block_table[position // heads[3]], position % heads[3]
    keys[place] = torch.nan
    batch = AttentionBatch(rows, heads[3], CPU)
    found = PagedBackend().attend(query, keys, values, batch, _options(extra, None, heads[0]))
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def _int8_pools(
    heads: tuple[int, int, int, int], rows: list[RowSpan]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, keys, values = _pools(heads, rows)
    return query, pack(keys.nan_to_num()), pack(values.nan_to_num())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_reads_int8(heads: tuple[int, int, int, int], shapes: list[tuple[int, int]]) -> None:
    rows = _rows(shapes, heads[3])
    query, keys, values = _int8_pools(heads, rows)
    options = _options("none", None, heads[0])
    found = PagedBackend().attend(query, keys, values, AttentionBatch(rows, heads[3], CPU), options)
    batch = AttentionBatch(rows, heads[3], CPU)
    wanted = SdpaBackend().attend(query.float(), keys, values, batch, options)
    assert _error(found, wanted) < 0.02


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(is_int8: bool) -> None:
    heads = HEADS[0]
    rows = _rows([(start, 2) for start in (3, 40, 100, 7, 64)], heads[3])
    query, keys, values = (_int8_pools if is_int8 else _pools)(heads, rows)
    options = _options("none", 50, heads[0])
    together = PagedBackend().attend(
        query, keys, values, AttentionBatch(rows, heads[3], CPU), options
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for index, row in enumerate(rows):
            part = slice(2 * index, 2 * index + 2)
            alone = PagedBackend().attend(
                query[part], keys, values, AttentionBatch([row], heads[3], CPU), options
            )
            assert torch.equal(alone, together[part])
    finally:
        torch.set_num_threads(before)


def test_a_query_may_come_in_another_order_of_memory() -> None:
    heads = HEADS[0]
    rows = _rows([(20, 1), (33, 1)], heads[3])
    query, keys, values = _pools(heads, rows)
    options = _options("none", None, heads[0])
    wanted = PagedBackend().attend(
        query, keys, values, AttentionBatch(rows, heads[3], CPU), options
    )
    turned = query.transpose(0, 1).contiguous().transpose(0, 1)
    batch = AttentionBatch(rows, heads[3], CPU)
    assert torch.equal(PagedBackend().attend(turned, keys, values, batch, options), wanted)


def test_pools_that_cannot_be_read_in_place_are_refused() -> None:
    heads = HEADS[0]
    rows = _rows([(20, 1)], heads[3])
    query, keys, values = _pools(heads, rows)
    batch = AttentionBatch(rows, heads[3], CPU)
    with pytest.raises(Internal, match="not contiguous"):
        PagedBackend().attend(
            query, keys.transpose(1, 2), values.transpose(1, 2), batch, _options("none", None, 6)
        )


def test_blocks_behind_the_pool_are_refused_before_memory_is_read() -> None:
    heads = HEADS[0]
    rows = _rows([(20, 1)], heads[3])
    query, keys, values = _pools(heads, rows)
    batch = AttentionBatch(rows, heads[3], CPU)
    few = max(rows[0].block_table)
    with pytest.raises(Internal, match=f"block {few} is not one of the pool's {few}"):
        PagedBackend().attend(query, keys[:few], values[:few], batch, _options("none", None, 6))


def test_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_gather", pytest.fail)
    heads = HEADS[0]
    rows = _rows([(20, 1), (33, 40)], heads[3])
    batch = AttentionBatch(rows, heads[3], CPU)
    PagedBackend().attend(*_pools(heads, rows), batch, _options("sinks", None, heads[0]))


def test_layers_that_it_cannot_compute_are_left_to_sdpa() -> None:
    shapes = [LayerShape(2, 64), LayerShape(2, 80), LayerShape(2, 288)]
    chosen = backends.choose_backends(shapes, CPU, torch.bfloat16, 16)
    assert [backend.name for backend in chosen.values()] == ["paged", "sdpa", "sdpa"]
    chosen = backends.choose_backends(shapes[:1], CPU, torch.float32, 16)
    assert [backend.name for backend in chosen.values()] == ["sdpa"]
    chosen = backends.choose_backends(shapes[:1], CPU, torch.float32, 16, kv_dtype=torch.int8)
    assert [backend.name for backend in chosen.values()] == ["sdpa"]
    chosen = backends.choose_backends(shapes[:1], CPU, torch.bfloat16, 16, kv_dtype=torch.int8)
    assert [backend.name for backend in chosen.values()] == ["paged"]
