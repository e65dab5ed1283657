"""KV blocks in memory under a byte budget: the first tier.

Content is verified when it comes and again when it goes: a flipped bit costs a recomputation, never
a wrong token. What is given up first is decided in `baton.core.eviction`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from baton.core.errors import InvalidRequest, KvChecksum, KvLayoutMismatch
from baton.core.eviction import EvictionOrder, recompute_cost
from baton.core.hashing import HASH_BYTES
from baton.wire.cache import CacheBlock

logger = logging.getLogger(__name__)

BLOCK_OVERHEAD_BYTES = 512
"""What a block costs besides its payload (keys, entry and object headers), roughly."""
MAX_POSITION = 1 << 24


@dataclass(frozen=True, slots=True)
class StoredBlock(CacheBlock):
    """One block, with content that this process owns."""

    payload: bytes

    @property
    def cost_bytes(self) -> int:
        """Bytes of the memory budget that the block takes, overhead included."""
        return len(self.payload) + BLOCK_OVERHEAD_BYTES

    @property
    def recompute_cost(self) -> float:
        """Cost of computing the block again; see `baton.core.eviction`."""
        return recompute_cost(self.link.position, self.layout.block_size)

    @property
    def is_intact(self) -> bool:
        """True if the payload still matches its checksum."""
        return xxhash.xxh3_64_intdigest(self.payload) == self.checksum


@dataclass(slots=True)
class TierCounters:
    """Counted since the start."""

    num_stored: int = 0
    num_hits: int = 0
    num_evicted: int = 0
    num_corrupt: int = 0
    """Blocks whose content had changed while stored, dropped when read."""


class BlockStore:
    """Blocks by chained hash. Not thread-safe: the event loop's alone."""

    def __init__(
        self, memory_bytes: int, on_evict: Callable[[StoredBlock], None] = lambda _: None
    ) -> None:
        """`on_evict` gets each block that the store evicts to make room."""
        self._memory_bytes = memory_bytes
        self._on_evict = on_evict
        self._blocks: dict[bytes, StoredBlock] = {}
        self._used_bytes = 0
        self.order = EvictionOrder()
        self.counters = TierCounters()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget in use; never more than `memory_bytes`."""
        return self._used_bytes

    @property
    def memory_bytes(self) -> int:
        """The memory budget."""
        return self._memory_bytes

    def put(self, block: StoredBlock) -> bool:
        """Stores a verified block, evicting others as needed.

        Returns:
            False when it was there already, or there is no room that is better given to it: it is
            larger than the budget, the rest is pinned, or the block before it is not here.
        """
        if block.block_hash in self._blocks:
            self.order.use(block.block_hash)
            return False
        if block.cost_bytes > self._memory_bytes or not self._make_room(block):
            return False
        self._blocks[block.block_hash] = block
        self.order.add(
            block.block_hash, block.link, cost=block.recompute_cost, num_bytes=block.cost_bytes
        )
        self._used_bytes += block.cost_bytes
        self.counters.num_stored += 1
        return True

    def get(self, block_hash: bytes) -> StoredBlock | None:
        """The block, verified; None if it is missing or its content has changed."""
        block = self._blocks.get(block_hash)
        if block is None:
            return None
        if not block.is_intact:
            self.counters.num_corrupt += 1
            logger.error("stored block is corrupt", extra={"num_bytes": len(block.payload)})
            self.order.remove(block_hash)
            self._forget(block_hash)
            return None
        self.counters.num_hits += 1
        return block

    def touch(self, block_hashes: Sequence[bytes]) -> None:
        """Notes a use of each block that is here."""
        for block_hash in block_hashes:
            self.order.use(block_hash)

    def clear(self) -> None:
        """Drops everything."""
        self._blocks.clear()
        self.order.clear()
        self._used_bytes = 0

    def _make_room(self, block: StoredBlock) -> bool:
        while self._used_bytes + block.cost_bytes > self._memory_bytes:
            # Without the block before it, it takes only room that no other block needs.
            is_useful = self.order.has_parent(block.link)
            victim = self.order.evict(keep=block.link.parent) if is_useful else None
            if victim is None:
                return False
            self.counters.num_evicted += 1
            self._on_evict(self._forget(victim))
        return True

    def _forget(self, block_hash: bytes) -> StoredBlock:
        block = self._blocks.pop(block_hash)
        self._used_bytes -= block.cost_bytes
        return block


def received_block(block: CacheBlock) -> StoredBlock:
    """A block from outside, checked; the payload is copied.

    Raises:
        InvalidRequest: a hash has a wrong length, or the position is out of range.
        KvLayoutMismatch: the payload's length is not that of the layout.
        KvChecksum: the payload does not match its checksum.
    """
    check_hash(block.block_hash)
    link, num_bytes = block.link, len(block.payload)
    if link.parent:
        check_hash(link.parent)
    if link.position > MAX_POSITION:
        raise InvalidRequest(f"a block's position is at most {MAX_POSITION}, got {link.position}")
    if num_bytes != block.layout.block_bytes:
        raise KvLayoutMismatch(
            f"a block of this layout has {block.layout.block_bytes} bytes, got {num_bytes}"
        )
    if xxhash.xxh3_64_intdigest(block.payload) != block.checksum:
        raise KvChecksum("a block's content does not match its checksum; send it again")
    return StoredBlock(block.block_hash, block.layout, block.checksum, bytes(block.payload), link)


def check_hash(block_hash: bytes) -> None:
    """Checks a hash from outside.

    Raises:
        InvalidRequest: it has a wrong length.
    """
    if len(block_hash) != HASH_BYTES:
        raise InvalidRequest(f"a block hash has {HASH_BYTES} bytes, got {len(block_hash)}")
