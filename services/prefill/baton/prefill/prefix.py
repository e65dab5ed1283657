"""Prefixes from and to the cache service: a help when it is quick, never a condition.

Whatever goes wrong here costs a computation and no request. After a failure the cache service is
left alone for a moment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import aclosing

from baton.core.errors import BatonError
from baton.core.sequence import SequenceSpec
from baton.engine.engine import Engine
from baton.prefill.peers import Block, CachePeer

logger = logging.getLogger(__name__)
_PAUSE_S = 5.0
_STORE_TIMEOUT_S = 30.0
_BATCH_BLOCKS = 64
"""Blocks exported at a time: bounds the memory that a write-back takes."""


class PrefixSource:
    """The cluster's prefix store, as one worker uses it."""

    def __init__(
        self,
        engine: Engine,
        *,
        find_cache: Callable[[], CachePeer | None],
        executor: Executor,
        timeout_s: float,
        max_queued_blocks: int,
    ) -> None:
        self._engine = engine
        self._find_cache = find_cache
        self._executor = executor
        self._timeout_s = timeout_s
        self._max_queued_blocks = max_queued_blocks
        self._queue: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._num_queued_blocks = 0
        self._paused_until_s = 0.0
        self.num_fetched_blocks = 0
        self.num_stored_blocks = 0
        self.num_dropped_blocks = 0
        """Blocks not stored because too many were waiting."""
        self.num_failures = 0

    async def fetch(self, spec: SequenceSpec) -> int:
        """Takes blocks that the store has and this worker lacks; returns how many.

        Takes at most the time limit. The last token's block is never fetched: it has to be
        computed for the first token.
        """
        cache = self._usable_cache()
        if cache is None:
            return 0
        hashes = self._hashes(spec)
        num_local = self._engine.match_prefix(spec.token_ids, spec.cache_salt)
        if num_local >= len(hashes):
            return 0
        try:
            async with asyncio.timeout(self._timeout_s):
                num_stored = await cache.num_stored(hashes, timeout_s=self._timeout_s)
                if num_stored <= num_local:
                    return 0
                return await self._take(cache, hashes[num_local:num_stored])
        except (BatonError, TimeoutError) as error:
            self._pause(error)
            return 0

    def offer(self, spec: SequenceSpec) -> None:
        """Has a computed prompt's full blocks stored in the background; never waits."""
        if self._usable_cache() is None:
            return
        hashes = self._hashes(spec)
        if not hashes:
            return
        if self._num_queued_blocks + len(hashes) > self._max_queued_blocks:
            self.num_dropped_blocks += len(hashes)
            return
        self._num_queued_blocks += len(hashes)
        self._queue.put_nowait(hashes)

    async def write_back(self) -> None:
        """Stores what was offered, for ever; run it as a task."""
        while True:
            hashes = await self._queue.get()
            try:
                cache = self._usable_cache()
                if cache is not None:
                    await self._store(cache, hashes)
            except BatonError as error:
                self._pause(error)
            finally:
                self._num_queued_blocks -= len(hashes)

    def _hashes(self, spec: SequenceSpec) -> list[bytes]:
        """Hashes of the full blocks before the last token's."""
        return self._engine.block_hashes(spec.token_ids[:-1], spec.cache_salt)

    def _usable_cache(self) -> CachePeer | None:
        return self._find_cache() if time.monotonic() >= self._paused_until_s else None

    async def _take(self, cache: CachePeer, hashes: list[bytes]) -> int:
        layout = self._engine.fingerprint.layout
        fetched = cache.fetch(hashes, layout, timeout_s=self._timeout_s)
        async with aclosing(fetched) as blocks:
            payloads = [memoryview(block.payload) async for block in blocks]
        num_imported = await asyncio.get_running_loop().run_in_executor(
            self._executor, self._engine.import_blocks, hashes[: len(payloads)], payloads
        )
        self.num_fetched_blocks += num_imported
        return num_imported

    async def _store(self, cache: CachePeer, hashes: list[bytes]) -> None:
        num_stored = await cache.num_stored(hashes, timeout_s=self._timeout_s)
        if num_stored < len(hashes):
            self.num_stored_blocks += await cache.store(
                self._exported(hashes[num_stored:]),
                self._engine.fingerprint,
                timeout_s=_STORE_TIMEOUT_S,
            )

    async def _exported(self, hashes: list[bytes]) -> AsyncIterator[Block]:
        loop = asyncio.get_running_loop()
        for start in range(0, len(hashes), _BATCH_BLOCKS):
            exported = await loop.run_in_executor(
                self._executor, self._engine.export_blocks, hashes[start : start + _BATCH_BLOCKS]
            )
            for block_hash, payload in exported:
                yield Block(block_hash, payload)

    def _pause(self, error: BatonError | TimeoutError) -> None:
        self.num_failures += 1
        self._paused_until_s = time.monotonic() + _PAUSE_S
        logger.info("cache service left alone for a moment", extra={"error": str(error)})
