"""Memory and disk together: what memory gives up comes back, verified, within both budgets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from baton.cache import disk_tier
from baton.cache.disk import DiskError
from baton.cache.disk_tier import DiskTier
from baton.cache.store import BLOCK_OVERHEAD_BYTES, StoredBlock
from baton.cache.tiers import TieredStore
from baton.core.hashing import KvLayout, block_hashes, root_hash
from baton.wire.clock import SystemClock
from tests.support.kv_blocks import chain, make_block, name

LAYOUT = KvLayout.one_group(block_size=16, dtype="float32", num_kv_heads=(2, 2), head_dim=(16, 16))
COST_BYTES = LAYOUT.block_bytes + BLOCK_OVERHEAD_BYTES
NUMBERS = list(range(1, 21))
HASHES = [name(number) for number in NUMBERS]


@asynccontextmanager
async def tiers(
    folder: Path, memory_blocks: int = 4, disk_bytes: int = 1 << 20, queue_bytes: int = 1 << 20
) -> AsyncIterator[TieredStore]:
    disk = await DiskTier.open(folder, disk_bytes, queue_bytes, SystemClock())
    running = asyncio.create_task(disk.run())
    try:
        yield TieredStore(memory_blocks * COST_BYTES, disk)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await disk.close()


async def read(store: TieredStore, hashes: Sequence[bytes] = HASHES) -> list[StoredBlock]:
    return [block async for block in store.read(hashes)]


def damage(disk: DiskTier, number: int) -> None:
    with disk._store._env.begin(write=True) as txn:
        record = bytearray(txn.get(name(number), db=disk._store._payloads))
        record[-1] ^= 1
        txn.put(name(number), bytes(record), db=disk._store._payloads)


async def test_what_memory_cannot_hold_is_read_from_disk_in_order(tmp_path: Path) -> None:
    blocks = chain(NUMBERS, LAYOUT)
    async with tiers(tmp_path) as store:
        assert all(store.put(block) for block in blocks)
        assert store.num_leading(HASHES) == 20, "also before it is written"
        assert await read(store) == blocks
        await store.disk.idle()
        assert await read(store) == blocks
        assert len(store.memory) == 4
        assert store.memory.used_bytes <= store.memory.memory_bytes
        assert store.disk.counters.num_hits > 0
        assert not store.put(blocks[7])
        assert store.disk.counters.num_stored == 20


async def test_small_reads_are_joined_and_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.cache.tiers.READ_BATCH_BYTES", 3 * LAYOUT.block_bytes)
    blocks = chain(NUMBERS, LAYOUT)
    async with tiers(tmp_path, memory_blocks=0) as store:
        for block in blocks:
            assert store.put(block)
        await store.disk.idle()
        assert await read(store) == blocks
        early = store.read(HASHES)
        assert await anext(early) == blocks[0]
        await early.aclose()


async def test_restart_finds_what_was_written(tmp_path: Path) -> None:
    blocks = chain(NUMBERS, LAYOUT)
    async with tiers(tmp_path) as store:
        for block in blocks:
            store.put(block)
        await store.disk.idle()
        store_id = store.disk.store_id
    async with tiers(tmp_path) as store:
        assert store.disk.store_id == store_id
        assert store.num_leading(HASHES) == 20
        assert await read(store) == blocks
        # The chain's order is known again: its end goes first.
        assert store.disk.order.evict() == name(20)


async def test_damaged_block_is_a_miss_is_counted_and_can_be_stored_again(tmp_path: Path) -> None:
    blocks = chain(NUMBERS, LAYOUT)
    async with tiers(tmp_path, memory_blocks=0) as store:
        for block in blocks:
            store.put(block)
        await store.disk.idle()
        damage(store.disk, 6)
        assert await read(store) == blocks[:5]
        assert store.disk.counters.num_corrupt == 1
        assert store.num_leading(HASHES) == 5
        await store.disk.idle()
        assert store.put(blocks[5])
        await store.disk.idle()
        assert await read(store) == blocks


async def test_disk_budget_holds_and_ends_of_chains_go_first(tmp_path: Path) -> None:
    # 40 chains of 10 blocks of 12 KiB with their page of the tree: far more than 1 MiB.
    async with tiers(tmp_path, memory_blocks=0, queue_bytes=1 << 30) as store:
        for start in range(0, 4000, 100):
            for block in chain(list(range(start + 1, start + 11)), LAYOUT):
                store.put(block)
                assert store.disk.used_bytes <= store.disk.usable_bytes
            await store.disk.idle()
        assert store.disk.counters.num_evicted > 200
        assert store.disk.counters.num_failed == 0
        file = tmp_path / "0" / "blocks.lmdb"
        assert file.stat().st_size <= 1 << 20
        lengths = [
            store.num_leading([name(start + i) for i in range(1, 11)])
            for start in range(0, 4000, 100)
        ]
        assert sum(lengths) == len(store.disk), "a block is there without those before it"


async def test_full_queue_drops_and_counts(tmp_path: Path) -> None:
    async with tiers(tmp_path, memory_blocks=20, queue_bytes=2 * COST_BYTES) as store:
        for block in chain(NUMBERS, LAYOUT):
            assert store.put(block)
        assert store.disk.queued_bytes <= 2 * COST_BYTES
        assert store.disk.counters.num_dropped == 18
        await store.disk.idle()
        # Given up by memory, a block that did not reach the disk is offered again.
        store.put(make_block(99, layout=LAYOUT))
        assert name(20) in store.disk


async def test_block_counts_as_queued_until_its_transaction_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiers(tmp_path) as store:
        begun, go_on = threading.Event(), threading.Event()
        write = store.disk._store.write

        def slow(*arguments: Any) -> None:
            begun.set()
            go_on.wait(10)
            write(*arguments)

        monkeypatch.setattr(store.disk._store, "write", slow)
        store.put(make_block(1, layout=LAYOUT))
        try:
            await asyncio.to_thread(begun.wait, 10)
            assert store.disk.queued_bytes == COST_BYTES, "a kill would lose it now"
        finally:
            go_on.set()
        await store.disk.idle()
        assert store.disk.queued_bytes == 0


async def test_failing_disk_costs_only_what_it_was_to_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_tier, "_PAUSE_S", 0.0)
    async with tiers(tmp_path, memory_blocks=1) as store:
        write = store.disk._store.write

        def fail(*_: object) -> None:
            raise lmdb.DiskError("no space left")

        monkeypatch.setattr(store.disk._store, "write", fail)
        assert store.put(make_block(1, layout=LAYOUT))
        await store.disk.idle()
        assert (store.disk.counters.num_failed, len(store.disk), store.disk.used_bytes) == (1, 0, 0)
        assert await read(store, [name(1)]) == [make_block(1, layout=LAYOUT)]
        monkeypatch.setattr(store.disk._store, "write", write)
        store.put(make_block(2, layout=LAYOUT))
        await store.disk.idle()
        assert name(1) in store.disk, "offered again when memory gave it up"


async def test_writer_survives_that_a_reader_gives_up_a_block_whose_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_tier, "_PAUSE_S", 0.0)
    async with tiers(tmp_path) as store:
        begun, fail = threading.Event(), threading.Event()
        write, read_block = store.disk._store.write, store.disk._store.read

        def fail_to_write(*_: object) -> None:
            begun.set()
            fail.wait(10)
            raise lmdb.DiskError("i/o error")

        def fail_to_read(_: object) -> None:
            raise DiskError("i/o error")

        monkeypatch.setattr(store.disk._store, "write", fail_to_write)
        monkeypatch.setattr(store.disk._store, "read", fail_to_read)
        store.put(make_block(1, layout=LAYOUT))
        await asyncio.to_thread(begun.wait, 10)
        assert await store.disk.read([name(1)]) == []
        monkeypatch.setattr(store.disk._store, "write", write)
        monkeypatch.setattr(store.disk._store, "read", read_block)
        fail.set()
        store.put(make_block(2, layout=LAYOUT))
        async with asyncio.timeout(10):
            await store.disk.idle()
        assert await store.disk.read([name(2)]) == [make_block(2, layout=LAYOUT)]
        assert store.disk.used_bytes == store.disk.size(name(2))


async def test_what_failed_to_be_deleted_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_tier, "_PAUSE_S", 0.0)
    async with tiers(tmp_path) as store:
        store.put(make_block(1, layout=LAYOUT))
        await store.disk.idle()
        store.memory.clear()
        damage(store.disk, 1)
        errors = [lmdb.DiskError("no space left")]
        write = store.disk._store.write

        def fail_once(*arguments: Any) -> None:
            if errors:
                raise errors.pop()
            write(*arguments)

        monkeypatch.setattr(store.disk._store, "write", fail_once)
        assert await read(store, HASHES[:1]) == []
        await store.disk.idle()
        assert errors == []
        assert list(store.disk._store.scan()) == []


async def test_smaller_budget_at_restart_is_kept(tmp_path: Path) -> None:
    async with tiers(tmp_path, disk_bytes=4 << 20) as store:
        for number in range(1, 150):
            store.put(make_block(number, layout=LAYOUT))
        await store.disk.idle()
        assert store.disk.used_bytes > 1 << 20
    async with tiers(tmp_path) as store:
        await store.disk.idle()
        assert store.disk.used_bytes <= store.disk.usable_bytes < 1 << 20
        found = [number for number in range(1, 150) if name(number) in store.disk]
        assert len(found) == len(store.disk)
        assert await read(store, [name(found[0])]) == [make_block(found[0], layout=LAYOUT)]


async def test_clear_empties_both_tiers_for_good(tmp_path: Path) -> None:
    async with tiers(tmp_path) as store:
        for block in chain(NUMBERS, LAYOUT):
            store.put(block)
        assert await store.clear() >= 4
        assert store.num_leading(HASHES) == 0
    async with tiers(tmp_path) as store:
        assert len(store.disk) == 0


async def test_blocks_of_another_model_or_tenant_never_match(tmp_path: Path) -> None:
    """Hashes cover fingerprint and salt, so what an older model stored is found by nobody."""
    tokens = list(range(160))
    old, new = (
        list(block_hashes(root_hash(digest, salt), tokens, 16))
        for digest, salt in ((b"m" * 16, "a"), (b"n" * 16, "a"))
    )
    other_tenant = list(block_hashes(root_hash(b"m" * 16, "b"), tokens, 16))
    async with tiers(tmp_path) as store:
        for block, block_hash in zip(chain(NUMBERS[:10], LAYOUT), old, strict=True):
            store.put(StoredBlock(block_hash, LAYOUT, block.checksum, block.payload, block.link))
        await store.disk.idle()
    async with tiers(tmp_path) as store:
        assert store.num_leading(old) == 10
        assert store.num_leading(new) == store.num_leading(other_tenant) == 0
        assert not set(old) & (set(new) | set(other_tenant))
