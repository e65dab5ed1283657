"""The cache's process: a store, an index, and what feeds and serves them."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from baton.cache.answers import AnswerStore
from baton.cache.cache import CacheLimits, LocalCache
from baton.cache.disk_tier import DiskTier
from baton.cache.metrics import make_metrics
from baton.cache.pins import Pins
from baton.cache.settings import CacheSettings
from baton.cache.stores import Stores
from baton.cache.tiers import TieredStore
from baton.rpc.kv_index_feed import KvIndexFeed
from baton.rpc.process import Runtime, ServiceSnapshot
from baton.rpc.tasks import Tasks
from baton.wire.cache import add_cache

logger = logging.getLogger(__name__)
_FINISH_WRITES_S = 5.0
_PIN_CHECK_S = 1.0


class CacheService:
    """Implements rpc.process.Service."""

    def __init__(self, runtime: Runtime[CacheSettings]) -> None:
        settings = runtime.settings
        self._runtime = runtime
        self._store = TieredStore(settings.memory_bytes)
        self._tasks = Tasks("cache", runtime.lifecycle.fail)
        self._feed = KvIndexFeed(runtime.control, runtime.members.view, runtime.clock)
        limits = CacheLimits(settings.max_prefix_blocks, settings.stall_timeout_s)
        largest_bytes = max(settings.memory_bytes, settings.disk_bytes * bool(settings.disk_path))
        self._stores = Stores(
            self._store,
            AnswerStore(settings.answer_bytes, settings.answer_ttl_s, runtime.clock.now),
            Pins(
                min(settings.pinned_bytes, largest_bytes // 2),
                self._store.orders,
                lambda: runtime.clock.wall_ns() / 1e9,
            ),
            self._feed.index,
        )
        metrics = make_metrics(runtime.metrics, self._stores)
        self._cache = LocalCache(self._stores, limits, metrics, runtime.clock)

    def register(self, server: Any) -> list[str]:
        """Serves the cache; returns the names of the gRPC services."""
        return [add_cache(server, self._cache)]

    async def start(self) -> None:
        """Opens the disk, and listens to KV events and to who comes and goes."""
        settings = self._runtime.settings
        if settings.disk_path is not None:
            disk = await DiskTier.open(
                settings.disk_path,
                settings.disk_bytes,
                settings.disk_queue_bytes,
                self._runtime.clock,
            )
            self._store.disk = disk
            self._tasks.spawn(disk.run(), "write to disk")
            self._store.load_pins(self._stores.pins)
            logger.info("disk tier open", extra={"num_blocks": len(disk), "store": disk.store_id})
        self._tasks.spawn(self._end_pins(), "end pins")
        await self._feed.start(self._runtime.bus, self._runtime.members)

    def snapshot(self) -> ServiceSnapshot:
        """What `baton status` shows."""
        memory, disk = self._store.memory, self._store.disk
        stats: dict[str, float] = {
            "stored_blocks": len(memory),
            "stored_bytes": memory.used_bytes,
            "memory_bytes": memory.memory_bytes,
            "hits": memory.counters.num_hits,
            "corrupt": memory.counters.num_corrupt,
        }
        if disk is not None:
            stats |= {
                "disk_blocks": len(disk),
                "disk_used_bytes": disk.used_bytes,
                "disk_queued_bytes": disk.queued_bytes,
                "disk_hits": disk.counters.num_hits,
                "disk_corrupt": disk.counters.num_corrupt,
            }
        return ServiceSnapshot(
            store_id="" if disk is None else disk.store_id,
            stats={
                **stats,
                "answers": len(self._stores.answers),
                "pins": len(self._stores.pins),
                "indexed_workers": len(self._feed.index.worker_ids),
                "kv_events": self._feed.num_events,
                "kv_snapshots": self._feed.num_snapshots,
            },
        )

    async def drain(self, grace_s: float) -> None:
        """Nothing to do: the server lets running calls end."""

    async def stop(self) -> None:
        """Ends running snapshots, and writes what waits for the disk."""
        await self._feed.close()
        disk = self._store.disk
        if disk is not None:
            with suppress(TimeoutError):
                async with self._runtime.clock.timeout(_FINISH_WRITES_S):
                    await disk.idle()
        await self._tasks.stop()
        if disk is not None:
            await disk.close()

    async def _end_pins(self) -> None:
        while True:
            await self._runtime.clock.sleep(_PIN_CHECK_S)
            if self._stores.pins.expire():
                await self._store.save_pins(self._stores.pins)

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Stored blocks are looked up, not announced."""
        return 0, []
