"""The cache's process: a store, an index, and what feeds and serves them."""

from __future__ import annotations

from typing import Any

from baton.cache.index import KV_SUBJECT, ClusterIndex
from baton.cache.servicer import SERVICE_NAME, CacheLimits, CacheMetrics, CacheServicer
from baton.cache.settings import CacheSettings
from baton.cache.store import BlockStore
from baton.rpc.metrics import Metrics
from baton.rpc.process import Runtime, ServiceSnapshot


class CacheService:
    """Implements rpc.process.Service."""

    def __init__(self, runtime: Runtime[CacheSettings]) -> None:
        settings = runtime.settings
        self._runtime = runtime
        self._store = BlockStore(settings.memory_bytes)
        self._index = ClusterIndex(runtime.control, runtime.members.view)
        limits = CacheLimits(
            max_prefix_blocks=settings.max_prefix_blocks,
            stall_timeout_s=settings.stall_timeout_s,
        )
        metrics = make_metrics(runtime.metrics, self._store)
        self._servicer = CacheServicer(self._store, self._index.blocks, limits, metrics)

    def register(self, server: Any) -> list[str]:
        """Adds the servicer; returns the full names of what it serves."""
        server.add_generic_rpc_handlers((self._servicer.handlers(),))
        return [SERVICE_NAME]

    async def start(self) -> None:
        """Listens to KV events and to who comes and goes."""
        await self._runtime.bus.subscribe(KV_SUBJECT, self._index.on_event)
        self._runtime.bus.on_connect(self._index.on_bus_connected)
        self._runtime.members.on_change(self._index.on_members)
        self._index.on_members(self._runtime.members.view())

    def snapshot(self) -> ServiceSnapshot:
        """What `baton status` shows."""
        counters = self._store.counters
        return ServiceSnapshot(
            stats={
                "stored_blocks": len(self._store),
                "stored_bytes": self._store.used_bytes,
                "memory_bytes": self._store.memory_bytes,
                "hits": counters.num_hits,
                "misses": counters.num_misses,
                "evicted": counters.num_evicted,
                "corrupt": counters.num_corrupt,
                "indexed_workers": len(self._index.blocks.worker_ids),
                "kv_events": self._index.num_events,
                "kv_snapshots": self._index.num_snapshots,
            }
        )

    async def drain(self, grace_s: float) -> None:
        """Nothing to do: the server lets running calls end."""

    async def stop(self) -> None:
        """Ends running snapshots."""
        await self._index.close()

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Stored blocks are looked up, not announced."""
        return 0, []


def make_metrics(metrics: Metrics, store: BlockStore) -> CacheMetrics:
    """Registers the cache's metrics."""
    metrics.gauge_at_scrape(
        "cache_store_bytes",
        "Memory for stored blocks, used and in all",
        "kind",
        lambda: {"used": float(store.used_bytes), "budget": float(store.memory_bytes)},
    )
    return CacheMetrics(
        fetched_blocks=metrics.counter(
            "cache_fetched_blocks", "Blocks sent (hit) and first missing ones (miss)", ("outcome",)
        ),
        fetched_bytes=metrics.counter("cache_fetched_bytes", "Bytes of KV sent"),
        stored_blocks=metrics.counter(
            "cache_stored_blocks", "Blocks received: stored, skipped or refused", ("outcome",)
        ),
        stored_bytes=metrics.counter("cache_stored_bytes", "Bytes of KV stored"),
        evicted_blocks=metrics.counter("cache_evicted_blocks", "Blocks evicted for room"),
    )
