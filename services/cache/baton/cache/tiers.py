"""Memory and disk as one store of blocks. Lives on one event loop."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence

from baton.cache.disk_tier import READ_BATCH_BYTES, DiskTier
from baton.cache.pins import Pins
from baton.cache.store import BlockStore, StoredBlock
from baton.core.eviction import EvictionOrder

logger = logging.getLogger(__name__)


class TieredStore:
    """Blocks come into memory and are written to disk behind it; those read come up again."""

    def __init__(self, memory_bytes: int, disk: DiskTier | None = None) -> None:
        self.memory = BlockStore(memory_bytes, self._evicted)
        self.disk = disk

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self.memory or (self.disk is not None and block_hash in self.disk)

    def put(self, block: StoredBlock) -> bool:
        """Stores a checked block; False when it was there already, or does not fit any tier."""
        if block.block_hash in self:
            self.touch([block.block_hash])
            return False
        is_stored = self.memory.put(block)
        if self.disk is not None:
            self.disk.offer(block)
        return is_stored or block.block_hash in self

    def num_leading(self, block_hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a prefix are here. Not a use of them."""
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in self:
                return index
        return len(block_hashes)

    async def read(self, block_hashes: Sequence[bytes]) -> AsyncGenerator[StoredBlock, None]:
        """Verified blocks in order, up to the first that is missing.

        The next blocks on disk are read while the last ones are taken. Close it when leaving early.
        """
        at = 0
        ahead: tuple[int, asyncio.Task[list[StoredBlock]]] | None = None
        try:
            while at < len(block_hashes):
                block = self.memory.get(block_hashes[at])
                if block is not None:
                    yield block
                    at += 1
                    continue
                run = self._run(block_hashes, at)
                if not run or self.disk is None:
                    return
                reading = ahead[1] if ahead is not None and ahead[0] == at else self._start(run)
                ahead = None
                blocks = await reading
                next_run = self._run(block_hashes, at + len(run))
                if next_run:
                    ahead = (at + len(run), self._start(next_run))
                for block in blocks:
                    self.memory.put(block)
                    yield block
                at += len(blocks)
                if not blocks:
                    return
        finally:
            if ahead is not None:
                ahead[1].cancel()

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """Notes a use of each block that is here."""
        self.memory.touch(block_hashes)
        if self.disk is not None:
            self.disk.touch(block_hashes)

    async def clear(self) -> int:
        """Drops everything; returns the number of blocks."""
        num_dropped = len(self.memory)
        self.memory.clear()
        if self.disk is not None:
            num_dropped = max(num_dropped, len(self.disk))
            await self.disk.clear()
        return num_dropped

    def orders(self) -> list[EvictionOrder]:
        """What decides which block goes, per tier."""
        return [self.memory.order, *([] if self.disk is None else [self.disk.order])]

    async def save_pins(self, pins: Pins) -> None:
        """Writes the pins down where there is a disk, so that they last over a restart."""
        if self.disk is not None:
            await self.disk.save_note(json.dumps(pins.dump()))

    def load_pins(self, pins: Pins) -> None:
        """Reads them back; what cannot be read is logged and left out."""
        if self.disk is None or not self.disk.note:
            return
        try:
            pins.load(json.loads(self.disk.note))
        except (ValueError, KeyError, TypeError) as error:
            logger.error("pins on disk cannot be read", extra={"error": str(error)})

    def _run(self, block_hashes: Sequence[bytes], start: int) -> list[bytes]:
        """The next blocks that only the disk has, as many as are read in one go."""
        run: list[bytes] = []
        num_bytes = 0
        for block_hash in block_hashes[start:]:
            if self.disk is None or block_hash in self.memory or block_hash not in self.disk:
                break
            if run and num_bytes >= READ_BATCH_BYTES:
                break
            num_bytes += self.disk.size(block_hash)
            run.append(block_hash)
        return run

    def _start(self, run: list[bytes]) -> asyncio.Task[list[StoredBlock]]:
        return asyncio.get_running_loop().create_task(self._read_disk(run))

    async def _read_disk(self, run: list[bytes]) -> list[StoredBlock]:
        if self.disk is None:
            return []
        waiting = self.disk.waiting(run[0])
        return [waiting] if waiting is not None else await self.disk.read(run)

    def _evicted(self, block: StoredBlock) -> None:
        """A block that did not reach the disk gets another chance when it leaves the memory."""
        if self.disk is not None:
            self.disk.offer(block)
