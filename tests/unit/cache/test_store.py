"""The block store: never above its budget, never a byte other than what was put in."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.cache.store import BLOCK_OVERHEAD_BYTES, BlockStore, StoredBlock
from baton.core.errors import InvalidRequest, KvChecksum, KvLayoutMismatch
from baton.core.hashing import KvLayout

LAYOUT = KvLayout(block_size=2, dtype="float32", num_kv_heads=(1, 1), head_dim=(4, 4))
COST_BYTES = LAYOUT.block_bytes + BLOCK_OVERHEAD_BYTES


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload(number: int) -> bytes:
    return bytes([number % 256]) * LAYOUT.block_bytes


def put(store: BlockStore, number: int) -> bool:
    data = payload(number)
    return store.put(name(number), xxhash.xxh3_64_intdigest(data), LAYOUT, memoryview(data))


def test_block_comes_back_as_it_went_in() -> None:
    store = BlockStore(10 * COST_BYTES)
    assert put(store, 1)
    block = store.get(name(1))
    assert block == StoredBlock(LAYOUT, xxhash.xxh3_64_intdigest(payload(1)), payload(1))
    assert store.get(name(2)) is None
    assert (store.counters.num_hits, store.counters.num_misses) == (1, 1)


def test_block_already_there_is_skipped() -> None:
    store = BlockStore(10 * COST_BYTES)
    assert put(store, 1)
    assert not put(store, 1)
    assert store.used_bytes == COST_BYTES


def test_wrong_checksum_is_refused_and_stores_nothing() -> None:
    store = BlockStore(10 * COST_BYTES)
    with pytest.raises(KvChecksum):
        store.put(name(1), 1234, LAYOUT, payload(1))
    assert len(store) == 0
    assert store.used_bytes == 0


def test_wrong_length_is_refused() -> None:
    store = BlockStore(10 * COST_BYTES)
    data = payload(1)[:-1]
    with pytest.raises(KvLayoutMismatch, match=str(LAYOUT.block_bytes)):
        store.put(name(1), xxhash.xxh3_64_intdigest(data), LAYOUT, data)
    with pytest.raises(InvalidRequest, match="16 bytes"):
        store.put(b"short", xxhash.xxh3_64_intdigest(payload(1)), LAYOUT, payload(1))


def test_block_that_changed_in_memory_is_dropped_when_read() -> None:
    store = BlockStore(10 * COST_BYTES)
    put(store, 1)
    block = store._blocks[name(1)]
    store._blocks[name(1)] = StoredBlock(block.layout, block.checksum, payload(2))
    assert store.get(name(1)) is None
    assert store.counters.num_corrupt == 1
    assert store.used_bytes == 0
    assert put(store, 1), "a good copy can be stored again"


def test_least_recently_used_block_goes_first() -> None:
    store = BlockStore(3 * COST_BYTES)
    for number in (1, 2, 3):
        put(store, number)
    store.touch([name(1)])
    put(store, 4)
    assert store.num_leading([name(2)]) == 0
    assert store.num_leading([name(1), name(3), name(4)]) == 3
    assert store.counters.num_evicted == 1


def test_prefix_loses_its_end_before_its_start() -> None:
    store = BlockStore(4 * COST_BYTES)
    prefix = [name(1), name(2), name(3)]
    for number in (1, 2, 3):
        put(store, number)
    store.touch(prefix)
    put(store, 8)
    put(store, 9)
    assert store.num_leading(prefix) == 2


def test_block_larger_than_the_budget_is_skipped_and_evicts_nothing() -> None:
    store = BlockStore(COST_BYTES)
    put(store, 1)
    wide = KvLayout(block_size=2, dtype="float32", num_kv_heads=(8,), head_dim=(64,))
    data = bytes(wide.block_bytes)
    assert not store.put(name(2), xxhash.xxh3_64_intdigest(data), wide, data)
    assert store.num_leading([name(1)]) == 1


def test_clear_gives_all_bytes_back() -> None:
    store = BlockStore(10 * COST_BYTES)
    put(store, 1)
    put(store, 2)
    assert store.clear() == 2
    assert store.used_bytes == 0
    assert store.get(name(1)) is None


@given(
    numbers=st.lists(st.integers(0, 20), max_size=60),
    touched=st.lists(st.integers(0, 20), max_size=5),
    budget_blocks=st.integers(0, 8),
)
def test_budget_holds_and_accounting_is_exact(
    numbers: list[int], touched: list[int], budget_blocks: int
) -> None:
    store = BlockStore(budget_blocks * COST_BYTES + 7)
    for number in numbers:
        put(store, number)
        assert store.used_bytes == len(store) * COST_BYTES <= store.memory_bytes
        store.touch([name(other) for other in touched])
    for number in numbers:
        block = store.get(name(number))
        assert block is None or block.payload == payload(number)
    if numbers and budget_blocks:
        assert len(store) == min(budget_blocks, len(set(numbers)))
