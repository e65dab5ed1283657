"""KV blocks in memory under a byte budget.

Content is verified when it comes and again when it goes: a flipped bit costs a recomputation, never
a wrong token. Blocks are evicted least recently used first; of blocks used together the later in a
prefix count as older, because without its start the rest of a prefix is of no use.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from baton.core.errors import InvalidRequest, KvChecksum, KvLayoutMismatch
from baton.core.hashing import HASH_BYTES, KvLayout

logger = logging.getLogger(__name__)

BLOCK_OVERHEAD_BYTES = 256
"""What a block costs besides its payload (keys, entry and object headers), roughly."""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block's content. The payload's layout is described in cache.proto."""

    layout: KvLayout
    checksum: int
    """XXH3-64 of the payload."""
    payload: bytes

    @property
    def cost_bytes(self) -> int:
        """What it takes from the budget."""
        return len(self.payload) + BLOCK_OVERHEAD_BYTES


@dataclass(slots=True)
class StoreCounters:
    """Counted since the start."""

    num_stored: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_evicted: int = 0
    num_corrupt: int = 0
    """Blocks whose content had changed while stored, dropped when read."""


class BlockStore:
    """Blocks by chained hash. Not thread-safe: the event loop's alone."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._blocks: OrderedDict[bytes, StoredBlock] = OrderedDict()
        self._used_bytes = 0
        self.counters = StoreCounters()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def used_bytes(self) -> int:
        """Taken from the budget; never more than the budget."""
        return self._used_bytes

    @property
    def memory_bytes(self) -> int:
        """The budget."""
        return self._memory_bytes

    def put(
        self, block_hash: bytes, checksum: int, layout: KvLayout, payload: bytes | memoryview
    ) -> bool:
        """Stores a copy of a block, evicting others as needed.

        Returns:
            False when it was there already, or is larger than the whole budget.

        Raises:
            InvalidRequest: the hash has a wrong length.
            KvLayoutMismatch: the payload's length is not that of the layout.
            KvChecksum: the payload does not match its checksum.
        """
        check_hash(block_hash)
        if len(payload) != layout.block_bytes:
            raise KvLayoutMismatch(
                f"a block of this layout has {layout.block_bytes} bytes, got {len(payload)}"
            )
        if xxhash.xxh3_64_intdigest(payload) != checksum:
            raise KvChecksum("a block's content does not match its checksum; send it again")
        if block_hash in self._blocks:
            self._blocks.move_to_end(block_hash)
            return False
        cost_bytes = len(payload) + BLOCK_OVERHEAD_BYTES
        if cost_bytes > self._memory_bytes:
            return False
        while self._used_bytes + cost_bytes > self._memory_bytes:
            self._evict()
        self._blocks[block_hash] = StoredBlock(layout, checksum, bytes(payload))
        self._used_bytes += cost_bytes
        self.counters.num_stored += 1
        return True

    def get(self, block_hash: bytes) -> StoredBlock | None:
        """The block, verified; None when it is not here, or is no longer what was stored."""
        block = self._blocks.get(block_hash)
        if block is not None and xxhash.xxh3_64_intdigest(block.payload) != block.checksum:
            self.counters.num_corrupt += 1
            logger.error("stored block is corrupt", extra={"num_bytes": len(block.payload)})
            self._remove(block_hash)
            block = None
        if block is None:
            self.counters.num_misses += 1
            return None
        self.counters.num_hits += 1
        return block

    def num_leading(self, block_hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a prefix are here. Not a use of them."""
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in self._blocks:
                return index
        return len(block_hashes)

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """Marks a prefix as used just now, its first block as the most recent."""
        for block_hash in reversed(block_hashes):
            if block_hash in self._blocks:
                self._blocks.move_to_end(block_hash)

    def clear(self) -> int:
        """Drops everything; returns the number of blocks."""
        num_dropped = len(self._blocks)
        self._blocks.clear()
        self._used_bytes = 0
        return num_dropped

    def _evict(self) -> None:
        self._remove(next(iter(self._blocks)))
        self.counters.num_evicted += 1

    def _remove(self, block_hash: bytes) -> None:
        self._used_bytes -= self._blocks.pop(block_hash).cost_bytes


def check_hash(block_hash: bytes) -> None:
    """Checks a hash from outside.

    Raises:
        InvalidRequest: it has a wrong length.
    """
    if len(block_hash) != HASH_BYTES:
        raise InvalidRequest(f"a block hash has {HASH_BYTES} bytes, got {len(block_hash)}")
