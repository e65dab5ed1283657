"""The second tier: what is on disk, what waits to be written, and what has to go for it.

Lives on one event loop; the file is touched on threads only. Blocks are written in the background
from a bounded queue, so that neither a worker nor the loop ever waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from baton.cache.disk import DamagedRecord, DiskEntry, DiskError, DiskStore, disk_bytes
from baton.cache.store import StoredBlock, TierCounters
from baton.core.clock import Clock
from baton.core.eviction import EvictionOrder, recompute_cost

logger = logging.getLogger(__name__)

READ_BATCH_BYTES = 4 << 20
"""Read in one go: bounds what a call under way holds in memory."""
_MAX_WRITE_BYTES = 16 << 20
_NUM_READERS = 2
_PAUSE_S = 5.0
"""After a failed write."""


@dataclass(slots=True)
class DiskCounters(TierCounters):
    """Counted since the start."""

    num_dropped: int = 0
    """Blocks not written because the queue, or the budget, was full."""
    num_failed: int = 0
    """Blocks not written because writing failed."""


class DiskTier:
    """Blocks on disk under a byte budget. `open` makes one, `close` ends it."""

    def __init__(self, store: DiskStore, queue_bytes: int, clock: Clock) -> None:
        self._store = store
        self._queue_bytes = queue_bytes
        self._clock = clock
        self.order = EvictionOrder()
        self.counters = DiskCounters()
        self._sizes: dict[bytes, int] = {}
        self._used_bytes = 0
        self._queued: dict[bytes, StoredBlock] = {}
        self._queued_bytes = 0
        self._writing: dict[bytes, StoredBlock] = {}
        self._removed: list[bytes] = []
        """To be deleted with the next write."""
        self._has_work = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_failing = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="baton-disk-write")
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="baton-disk-read")

    @classmethod
    async def open(
        cls, folder: Path, budget_bytes: int, queue_bytes: int, clock: Clock
    ) -> DiskTier:
        """Opens or creates a store, and learns what is in it.

        Raises:
            InvalidRequest: the folder cannot be used.
        """

        def load() -> tuple[DiskStore, list[DiskEntry | bytes]]:
            store = DiskStore(folder, budget_bytes)
            return store, list(store.scan())

        store, found = await asyncio.to_thread(load)
        tier = cls(store, queue_bytes, clock)
        tier._learn(found)
        return tier

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._sizes or block_hash in self._queued

    @property
    def store_id(self) -> str:
        """Names the store, for ever."""
        return self._store.store_id

    @property
    def used_bytes(self) -> int:
        """Bytes of the file that blocks take, those being written included."""
        return self._used_bytes

    @property
    def usable_bytes(self) -> int:
        """Most bytes of the file that blocks may take."""
        return self._store.usable_bytes

    @property
    def queued_bytes(self) -> int:
        """Content that a kill would lose: it waits to be written, or its transaction is open."""
        return self._queued_bytes + sum(block.cost_bytes for block in self._writing.values())

    def offer(self, block: StoredBlock) -> None:
        """Has a block written in the background, unless it is there or the queue is full."""
        if block.block_hash in self:
            return
        if self._queued_bytes + block.cost_bytes > self._queue_bytes:
            self.counters.num_dropped += 1
            return
        self._queued[block.block_hash] = block
        self._queued_bytes += block.cost_bytes
        self._wake()

    def waiting(self, block_hash: bytes) -> StoredBlock | None:
        """A block that is not on disk yet, but about to be."""
        return self._queued.get(block_hash) or self._writing.get(block_hash)

    def size(self, block_hash: bytes) -> int:
        """Bytes that a block takes on disk; 0 if it is not there."""
        return self._sizes.get(block_hash, 0)

    async def read(self, block_hashes: Sequence[bytes]) -> list[StoredBlock]:
        """Blocks in order, verified, up to the first one that is missing or damaged."""
        loop = asyncio.get_running_loop()
        blocks, bad = await loop.run_in_executor(self._readers, self._read_all, block_hashes)
        if bad is not None and bad in self._sizes:
            self.counters.num_corrupt += 1
            logger.error("block on disk is damaged, dropped")
            self.order.remove(bad)
            self._give_up(bad)
        self.counters.num_hits += len(blocks)
        return blocks

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """Notes a use of each block that is here."""
        for block_hash in block_hashes:
            self.order.use(block_hash)

    @property
    def note(self) -> str:
        """The text that was saved beside the blocks before the start; empty if none was."""
        return self._store.note

    async def save_note(self, text: str) -> None:
        """Saves a text beside the blocks; a failure is logged."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writer, self._store.save_note, text)
        except DiskError as error:
            logger.error("note not written to disk", extra={"error": str(error)})

    async def run(self) -> None:
        """Writes what is offered, for ever; run it as a task."""
        while True:
            if not self._queued and not self._removed:
                self._is_idle.set()
                self._has_work.clear()
            await self._has_work.wait()
            await self._write_some()

    async def idle(self) -> None:
        """Returns when everything offered so far is written, or given up."""
        await self._is_idle.wait()

    async def clear(self) -> None:
        """Drops everything."""
        self._queued.clear()
        self._queued_bytes = 0
        await self.idle()
        self._sizes.clear()
        self._used_bytes = 0
        self.order.clear()
        await asyncio.get_running_loop().run_in_executor(self._writer, self._store.clear)

    async def close(self) -> None:
        """Ends reading and writing; what is still queued is lost."""
        await asyncio.to_thread(self._readers.shutdown)
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._store.close)

    async def _write_some(self) -> None:
        batch = self._take_batch()
        removed, self._removed = self._removed, []
        if not batch and not removed:
            return
        self._writing = batch
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._writer, self._store.write, list(batch.values()), removed
            )
        except DiskError as error:
            logger.error("blocks not written to disk", extra={"error": str(error)})
            self.counters.num_failed += len(batch)
            for block_hash in batch:
                # A reader that found the block damaged may have given it up meanwhile.
                if block_hash in self._sizes:
                    self.order.remove(block_hash)
                    self._used_bytes -= self._sizes.pop(block_hash)
            self._removed = removed + self._removed
            self._is_failing = True
            await self._clock.sleep(_PAUSE_S)
        else:
            self.counters.num_stored += len(batch)
            self._is_failing = False
        finally:
            self._writing = {}

    def _take_batch(self) -> dict[bytes, StoredBlock]:
        """Blocks of the queue to write now; what has to go for them is in `_removed` then."""
        batch: dict[bytes, StoredBlock] = {}
        if self._is_failing and self._removed:
            return batch  # Deleting first may be what makes room.
        num_bytes, limit_bytes = 0, min(_MAX_WRITE_BYTES, self.usable_bytes // 16)
        while self._queued and (not batch or num_bytes < limit_bytes):
            block_hash = next(iter(self._queued))
            block = self._queued.pop(block_hash)
            self._queued_bytes -= block.cost_bytes
            size = disk_bytes(len(block.payload))
            if not self._make_room(block, size, batch):
                self.counters.num_dropped += 1
                continue
            batch[block_hash] = block
            self._sizes[block_hash] = size
            self._used_bytes += size
            self.order.add(block_hash, block.link, cost=block.recompute_cost, num_bytes=size)
            num_bytes += size
        return batch

    def _make_room(self, block: StoredBlock, size: int, batch: dict[bytes, StoredBlock]) -> bool:
        if size > self.usable_bytes:
            return False
        while self._used_bytes + size > self.usable_bytes:
            is_useful = self.order.has_parent(block.link)
            victim = self.order.evict(keep=block.link.parent) if is_useful else None
            if victim is None:
                return False
            self.counters.num_evicted += 1
            self._used_bytes -= self._sizes.pop(victim)
            if batch.pop(victim, None) is None:
                self._removed.append(victim)
        return True

    def _learn(self, found: Iterable[DiskEntry | bytes]) -> None:
        for entry in found:
            if isinstance(entry, bytes):
                self.counters.num_corrupt += 1
                self._removed.append(entry)
            else:
                cost = recompute_cost(entry.link.position, entry.block_size)
                self.order.add(entry.block_hash, entry.link, cost=cost, num_bytes=entry.num_bytes)
                self._sizes[entry.block_hash] = entry.num_bytes
                self._used_bytes += entry.num_bytes
        while self._used_bytes > self.usable_bytes and (victim := self.order.evict()):
            self.counters.num_evicted += 1
            self._give_up(victim)
        if self._removed:
            self._wake()

    def _wake(self) -> None:
        self._is_idle.clear()
        self._has_work.set()

    def _give_up(self, block_hash: bytes) -> None:
        """Has a block deleted that `order` has forgotten."""
        self._used_bytes -= self._sizes.pop(block_hash)
        self._removed.append(block_hash)
        self._wake()

    def _read_all(self, block_hashes: Sequence[bytes]) -> tuple[list[StoredBlock], bytes | None]:
        """On a reader's thread: blocks up to the first missing one, and that if it is damaged."""
        blocks: list[StoredBlock] = []
        for block_hash in block_hashes:
            try:
                block = self._store.read(block_hash)
            except (DamagedRecord, DiskError):
                return blocks, block_hash
            if block is None:
                break
            blocks.append(block)
        return blocks, None
