"""What a cache service answers, from its stores and its index."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from baton.cache.metrics import CacheMetrics
from baton.cache.pins import Pin
from baton.cache.store import check_hash, received_block
from baton.cache.stores import Stores
from baton.core.clock import Clock
from baton.core.errors import InvalidRequest, KvChecksum, Stalled
from baton.core.hashing import KvLayout
from baton.wire.cache import CacheBlock, PrefixMatch, StoreCounts
from baton.wire.inference.pins import PinnedPrefix


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds on one call."""

    max_prefix_blocks: int
    stall_timeout_s: float


class LocalCache:
    """Implements wire.cache.CacheServer. Lives on one event loop."""

    def __init__(
        self, stores: Stores, limits: CacheLimits, metrics: CacheMetrics, clock: Clock
    ) -> None:
        self._store = stores.blocks
        self._answers = stores.answers
        self._pins = stores.pins
        self._index = stores.index
        self._limits = limits
        self._metrics = metrics
        self._clock = clock

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """How much of a prefix is here, and at which workers."""
        checked = self._checked(hashes)
        return PrefixMatch(self._store.num_leading(checked), self._index.match(checked))

    async def fetch(self, hashes: Sequence[bytes]) -> AsyncGenerator[CacheBlock, None]:
        """Stored blocks in order, of one layout, up to the first that is missing."""
        checked = self._checked(hashes)
        layout: KvLayout | None = None
        num_sent = 0
        try:
            async with aclosing(self._store.read(checked)) as blocks:
                async for block in blocks:
                    if layout is not None and block.layout != layout:
                        break
                    layout = block.layout
                    yield block
                    num_sent += 1
                    self._metrics.fetched_blocks.labels("hit").inc()
                    self._metrics.fetched_bytes.inc(len(block.payload))
            if num_sent < len(checked):
                self._metrics.fetched_blocks.labels("miss").inc()
        finally:
            self._store.touch(checked[:num_sent])

    async def store(self, blocks: AsyncIterator[CacheBlock]) -> StoreCounts:
        """Stores a stream of blocks; those before an error stay stored.

        Raises:
            InvalidRequest: there are too many, or one cannot be a block.
            KvChecksum: one is damaged.
            Stalled: the next one does not arrive in time.
        """
        num_received = num_stored = 0
        while (block := await self._next(blocks)) is not None:
            if num_received >= self._limits.max_prefix_blocks:
                raise InvalidRequest(
                    f"store at most {self._limits.max_prefix_blocks} blocks in one call"
                )
            num_stored += self._put(block)
            num_received += 1
        return StoreCounts(num_stored, num_received - num_stored)

    async def drop(self) -> int:
        """Empties the store; returns the number of blocks."""
        return await self._store.clear()

    def answer(self, key: bytes) -> bytes | None:
        """The answer kept under a key, if there is one."""
        return self._answers.get(key)

    def store_answer(self, key: bytes, answer: bytes) -> bool:
        """Keeps an answer; False when it does not fit."""
        return self._answers.put(key, answer)

    async def pin(
        self, hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str
    ) -> PinnedPrefix:
        """Pins a prefix; raises as `Pins.pin` does."""
        pin = self._pins.pin(self._checked(hashes), block_bytes, ttl_s, label)
        await self._store.save_pins(self._pins)
        return self._described(pin)

    async def unpin(self, pin_id: str) -> bool:
        """Removes a pin; False when there is none of that id."""
        found = self._pins.unpin(pin_id)
        if found:
            await self._store.save_pins(self._pins)
        return found

    def pins(self) -> list[PinnedPrefix]:
        """The pins of this replica."""
        return [self._described(pin) for pin in self._pins.current()]

    def _put(self, received: CacheBlock) -> bool:
        try:
            block = received_block(received)
        except KvChecksum:
            self._metrics.stored_blocks.labels("refused").inc()
            raise
        is_new = self._store.put(block)
        self._metrics.stored_blocks.labels("stored" if is_new else "skipped").inc()
        if is_new:
            self._metrics.stored_bytes.inc(len(block.payload))
        return is_new

    def _described(self, pin: Pin) -> PinnedPrefix:
        return PinnedPrefix(
            pin_id=pin.pin_id,
            label=pin.label,
            num_blocks=len(pin.block_hashes),
            num_stored_blocks=self._store.num_leading(pin.block_hashes),
            num_bytes=pin.num_bytes,
            remaining_s=self._pins.remaining_s(pin),
        )

    async def _next(self, blocks: AsyncIterator[CacheBlock]) -> CacheBlock | None:
        try:
            async with self._clock.timeout(self._limits.stall_timeout_s):
                return await anext(blocks, None)
        except TimeoutError:
            raise Stalled(
                f"no block arrived for {self._limits.stall_timeout_s:g} s; send again"
            ) from None

    def _checked(self, hashes: Sequence[bytes]) -> list[bytes]:
        if not 0 < len(hashes) <= self._limits.max_prefix_blocks:
            raise InvalidRequest(
                f"block_hashes must have 1 to {self._limits.max_prefix_blocks} entries,"
                f" got {len(hashes)}"
            )
        for block_hash in hashes:
            check_hash(block_hash)
        return list(hashes)
