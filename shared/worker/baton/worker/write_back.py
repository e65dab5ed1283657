"""Blocks of a worker's prefix cache to the cache service, in the background.

A help and never a condition: what cannot be stored soon is not stored, and no request waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from baton.core.errors import BatonError
from baton.core.eviction import ChainLink
from baton.engine.engine import Engine
from baton.rpc.cache_access import CacheAccess
from baton.rpc.peers import Block, CachePeer

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
        """Has a prefix's full blocks stored in the background; never waits."""
        if not hashes or self._cache.replica(hashes[0]) is None:
            return
        if self._num_queued_blocks + len(hashes) > self._max_queued_blocks:
            self.num_dropped_blocks += len(hashes)
            return
        self._num_queued_blocks += len(hashes)
        self._queue.put_nowait(hashes)

    async def run(self) -> None:
        """Stores what was offered, for ever; run it as a task."""
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
            await self._store_at(cache, hashes)
        except BatonError as error:
            self._cache.failed(cache, error)

    async def _store_at(self, cache: CachePeer, hashes: list[bytes]) -> None:
        num_stored = await cache.num_stored(hashes, timeout_s=_STORE_TIMEOUT_S)
        if num_stored < len(hashes):
            self.num_stored_blocks += await cache.store(
                self._exported(hashes, num_stored),
                self._engine.fingerprint,
                timeout_s=_STORE_TIMEOUT_S,
            )

    async def _exported(self, hashes: list[bytes], first: int) -> AsyncIterator[Block]:
        loop = asyncio.get_running_loop()
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
                yield Block(block_hash, payload, ChainLink(parent, position))
