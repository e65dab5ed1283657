"""The memory tier: never above its budget, never a byte other than what was put in."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.cache.store import BLOCK_OVERHEAD_BYTES, BlockStore, StoredBlock, received_block
from baton.core.errors import InvalidRequest, KvChecksum, KvLayoutMismatch
from baton.core.eviction import ChainLink
from baton.core.hashing import KvLayout
from baton.wire.cache import CacheBlock
from tests.support.kv_blocks import LAYOUT, chain, make_block, name, payload

COST_BYTES = LAYOUT.block_bytes + BLOCK_OVERHEAD_BYTES


def held(store: BlockStore, numbers: list[int]) -> list[int]:
    return [number for number in numbers if name(number) in store]


def test_block_comes_back_as_it_went_in() -> None:
    store = BlockStore(10 * COST_BYTES)
    checksum = xxhash.xxh3_64_intdigest(payload(1))
    block = received_block(CacheBlock(name(1), LAYOUT, checksum, memoryview(payload(1))))
    assert store.put(block)
    assert store.get(name(1)) == block == make_block(1)
    assert store.get(name(2)) is None
    assert store.counters.num_hits == 1


def test_block_already_there_is_skipped() -> None:
    store = BlockStore(10 * COST_BYTES)
    assert store.put(make_block(1))
    assert not store.put(make_block(1))
    assert store.used_bytes == COST_BYTES


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"checksum": 1234}, KvChecksum, "checksum"),
        ({"payload": payload(1)[:-1]}, KvLayoutMismatch, str(LAYOUT.block_bytes)),
        ({"block_hash": b"short"}, InvalidRequest, "16 bytes"),
        ({"link": ChainLink(b"short", 1)}, InvalidRequest, "16 bytes"),
        ({"link": ChainLink(name(1), 1 << 25)}, InvalidRequest, "position"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    fields = {
        "block_hash": name(1),
        "checksum": xxhash.xxh3_64_intdigest(payload(1)),
        "layout": LAYOUT,
        "payload": payload(1),
    }
    with pytest.raises(error, match=text):
        received_block(CacheBlock(**{**fields, **change}))


def test_block_that_changed_in_memory_is_dropped_when_read() -> None:
    store = BlockStore(10 * COST_BYTES)
    good = make_block(1)
    store.put(good)
    store._blocks[name(1)] = StoredBlock(good.block_hash, LAYOUT, good.checksum, payload(2))
    assert store.get(name(1)) is None
    assert store.counters.num_corrupt == 1
    assert store.used_bytes == 0
    assert store.put(good), "a good copy can be stored again"


def test_least_recently_used_block_goes_first() -> None:
    evicted: list[StoredBlock] = []
    store = BlockStore(3 * COST_BYTES, evicted.append)
    for number in (1, 2, 3):
        store.put(make_block(number))
    store.touch([name(1)])
    store.put(make_block(4))
    assert held(store, [1, 2, 3, 4]) == [1, 3, 4]
    assert [block.block_hash for block in evicted] == [name(2)]
    assert store.counters.num_evicted == 1


def test_prefix_loses_its_end_before_its_start() -> None:
    store = BlockStore(4 * COST_BYTES)
    for block in chain([1, 2, 3]):
        store.put(block)
    for number in (8, 9):
        store.put(make_block(number))
        store.touch([name(number)] * 3)
    assert held(store, [1, 2, 3, 8, 9]) == [1, 2, 8, 9]


def test_chain_longer_than_the_budget_keeps_its_start() -> None:
    store = BlockStore(4 * COST_BYTES)
    kept = [store.put(block) for block in chain(list(range(1, 9)))]
    assert kept == [True] * 4 + [False] * 4
    assert held(store, list(range(1, 9))) == [1, 2, 3, 4]


def test_block_without_the_one_before_it_takes_only_free_room() -> None:
    store = BlockStore(2 * COST_BYTES)
    orphan = make_block(7, ChainLink(name(6), 6))
    store.put(make_block(1))
    assert store.put(orphan)
    store.put(make_block(2))
    store.put(make_block(3))
    assert not store.put(make_block(9, ChainLink(name(8), 8)))


def test_pinned_blocks_fill_the_store_and_others_are_refused() -> None:
    store = BlockStore(2 * COST_BYTES)
    store.order.pin([name(1), name(2)])
    store.put(make_block(1))
    store.put(make_block(2))
    assert not store.put(make_block(3))
    store.order.unpin([name(2)])
    assert store.put(make_block(3))
    assert held(store, [1, 2, 3]) == [1, 3]


def test_block_larger_than_the_budget_is_skipped_and_evicts_nothing() -> None:
    store = BlockStore(COST_BYTES)
    store.put(make_block(1))
    wide = KvLayout.one_group(block_size=2, dtype="float32", num_kv_heads=(8,), head_dim=(64,))
    data = bytes(wide.block_bytes)
    assert not store.put(StoredBlock(name(2), wide, xxhash.xxh3_64_intdigest(data), data))
    assert name(1) in store


def test_clear_gives_all_bytes_back() -> None:
    store = BlockStore(10 * COST_BYTES)
    store.put(make_block(1))
    store.put(make_block(2))
    store.clear()
    assert (len(store), store.used_bytes) == (0, 0)
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
        store.put(make_block(number))
        assert store.used_bytes == len(store) * COST_BYTES <= store.memory_bytes
        store.touch([name(other) for other in touched])
    for number in numbers:
        block = store.get(name(number))
        assert block is None or block.payload == payload(number)
    assert len(store) == min(budget_blocks, len(set(numbers)))
