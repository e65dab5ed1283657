"""Prefixes from and to the cache service.

Best effort: a slow or missing cache costs a computation and never fails a request.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.core.sequence import SequenceSpec
from baton.worker.host import EngineHost


class PrefixSource:
    """The cluster's prefix store, as one worker uses it."""

    def __init__(self, host: EngineHost, clock: Clock, *, timeout_s: float) -> None:
        self._engine = host.engine
        self._clock = clock
        self._cache = host.cache
        self._write_back = host.write_back
        self._copiers = host.copiers
        self._timeout_s = timeout_s
        self.num_fetched_blocks = 0

    async def fetch(self, spec: SequenceSpec) -> int:
        """Takes blocks that the store has and this worker lacks; returns how many.

        Takes at most the time limit; what came within it counts. The last token's block is never
        fetched: it has to be computed for the first token.
        """
        hashes = self._hashes(spec)
        cache = self._cache.replica(hashes[0]) if hashes else None
        if cache is None:
            return 0
        num_local = self._engine.match_prefix(hashes)
        if num_local >= len(hashes):
            return 0
        payloads: list[memoryview] = []
        try:
            async with self._clock.timeout(self._timeout_s):
                num_stored = await cache.num_stored(hashes, timeout_s=self._timeout_s)
                if num_stored > num_local:
                    layout = self._engine.fingerprint.layout
                    wanted = hashes[num_local:num_stored]
                    fetched = cache.fetch(wanted, layout, timeout_s=self._timeout_s)
                    async with aclosing(fetched) as blocks:
                        async for block in blocks:
                            payloads += [memoryview(block.payload)]  # what comes in time counts
        except (BatonError, TimeoutError) as error:
            self._cache.failed(cache, error)
        if not payloads:
            return 0
        num_imported = await asyncio.get_running_loop().run_in_executor(
            self._copiers,
            self._engine.transfer.import_blocks,
            hashes[num_local : num_local + len(payloads)],
            payloads,
            hashes[:num_local],
        )
        self.num_fetched_blocks += num_imported
        return num_imported

    def offer(self, spec: SequenceSpec) -> None:
        """Stores a computed prompt's full blocks in the background; never waits."""
        self._write_back.offer(self._hashes(spec))

    def _hashes(self, spec: SequenceSpec) -> list[bytes]:
        """Hashes of the full blocks before the last token's."""
        num_blocks = (len(spec.token_ids) - 1) // self._engine.fingerprint.layout.block_size
        return self._engine.block_hashes(spec)[:num_blocks]
