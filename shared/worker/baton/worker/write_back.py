"""Blocks of a worker's prefix cache to the cache service, in the background.

Best effort: blocks that cannot be stored soon are dropped, and no request waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor

import xxhash

from baton.core.errors import BatonError
from baton.core.eviction import ChainLink
from baton.engine.engine import Engine
from baton.rpc.cache_access import CacheAccess
from baton.wire.cache import CacheBlock

_STORE_TIMEOUT_S = 30.0
_BATCH_BLOCKS = 64
"""Blocks exported at a time: bounds the memory that a write-back takes."""


class WriteBack:
    """Blocks that wait to be stored."""

    def __init__(
        self, engine: Engine, cache: CacheAccess, executor: Executor, max_queued_blocks: int
    ) -> None:
        """`executor` copies the blocks' content; the caller shuts it down."""
        self._engine = engine
        self._cache = cache
        self._executor = executor
        self._max_queued_blocks = max_queued_blocks
        self._queue: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._num_queued_blocks = 0
        self.num_stored_blocks = 0
        self.num_dropped_blocks = 0
        """Blocks not stored because too many were waiting."""

    def offer(self, hashes: list[bytes]) -> None:
        """Stores a prefix's full blocks in the background; never waits."""
        if not hashes or self._cache.replica(hashes[0]) is None:
            return
        if self._num_queued_blocks + len(hashes) > self._max_queued_blocks:
            self.num_dropped_blocks += len(hashes)
            return
        self._num_queued_blocks += len(hashes)
        self._queue.put_nowait(hashes)

    async def run(self) -> None:
        """Stores offered prefixes until it is cancelled; run it as a task."""
        while True:
            hashes = await self._queue.get()
            try:
                await self._store(hashes)
            finally:
                self._num_queued_blocks -= len(hashes)

    async def _store(self, hashes: list[bytes]) -> None:
        cache = self._cache.replica(hashes[0])
        if cache is None:
            return
        try:
            num_stored = await cache.num_stored(hashes, timeout_s=_STORE_TIMEOUT_S)
            if num_stored < len(hashes):
                blocks = self._exported(hashes, num_stored)
                self.num_stored_blocks += await cache.store(blocks, timeout_s=_STORE_TIMEOUT_S)
        except BatonError as error:
            self._cache.failed(cache, error)

    async def _exported(self, hashes: list[bytes], first: int) -> AsyncIterator[CacheBlock]:
        loop = asyncio.get_running_loop()
        layout = self._engine.fingerprint.layout
        positions = {block_hash: position for position, block_hash in enumerate(hashes)}
        for start in range(first, len(hashes), _BATCH_BLOCKS):
            exported = await loop.run_in_executor(
                self._executor,
                self._engine.transfer.export_blocks,
                hashes[start : start + _BATCH_BLOCKS],
            )
            for block_hash, payload in exported:
                position = positions[block_hash]
                parent = hashes[position - 1] if position else b""
                checksum = xxhash.xxh3_64_intdigest(payload)
                yield CacheBlock(block_hash, layout, checksum, payload, ChainLink(parent, position))
