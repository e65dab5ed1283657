"""The cache's metrics: what went through, and what the tiers count."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from prometheus_client import Counter

from baton.cache.answers import AnswerCounters
from baton.cache.stores import Stores
from baton.cache.tiers import TieredStore
from baton.rpc.metrics import Metrics


@dataclass(frozen=True, slots=True)
class CacheMetrics:
    """Counts of what went through."""

    fetched_blocks: Counter
    """By `outcome`: hit or miss (the first missing block of a fetch)."""
    fetched_bytes: Counter
    stored_blocks: Counter
    """By `outcome`: stored, skipped or refused."""
    stored_bytes: Counter


def make_metrics(metrics: Metrics, stores: Stores) -> CacheMetrics:
    """Registers the cache's metrics."""
    store = stores.blocks
    metrics.gauge_at_scrape(
        "cache_store_bytes",
        "Room, used and in all",
        "kind",
        lambda: _room(stores),
    )
    metrics.counter_at_scrape(
        "cache_hit_blocks", "Blocks read", "tier", lambda: _by_tier(store, "num_hits")
    )
    metrics.counter_at_scrape(
        "cache_evicted_blocks",
        "Blocks evicted for room",
        "tier",
        lambda: _by_tier(store, "num_evicted"),
    )
    metrics.counter_at_scrape(
        "cache_corrupt_blocks",
        "Blocks dropped because they were not what was stored",
        "tier",
        lambda: _by_tier(store, "num_corrupt"),
    )
    metrics.counter_at_scrape(
        "cache_disk_blocks",
        "Blocks for the disk, by what became of them",
        "outcome",
        lambda: _writes(store),
    )
    metrics.counter_at_scrape(
        "cache_answers",
        "Kept answers, by what happened",
        "outcome",
        lambda: _answers(stores.answers.counters),
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
    )


def _room(stores: Stores) -> dict[str, float]:
    store = stores.blocks
    room = {
        "memory_used": float(store.memory.used_bytes),
        "memory_budget": float(store.memory.memory_bytes),
        "pinned_used": float(stores.pins.used_bytes),
        "pinned_budget": float(stores.pins.limit_bytes),
        "answers_used": float(stores.answers.used_bytes),
        "answers_budget": float(stores.answers.budget_bytes),
    }
    if store.disk is not None:
        room |= {
            "disk_used": float(store.disk.used_bytes),
            "disk_budget": float(store.disk.usable_bytes),
            "disk_queued": float(store.disk.queued_bytes),
        }
    return room


def _by_tier(store: TieredStore, counter: str) -> dict[str, float]:
    counts = {"memory": float(getattr(store.memory.counters, counter))}
    if store.disk is not None:
        counts["disk"] = float(getattr(store.disk.counters, counter))
    return counts


def _writes(store: TieredStore) -> dict[str, float]:
    if store.disk is None:
        return {}
    counters = store.disk.counters
    return {
        "written": float(counters.num_stored),
        "dropped": float(counters.num_dropped),
        "failed": float(counters.num_failed),
    }


def _answers(counters: AnswerCounters) -> dict[str, float]:
    return {name.removeprefix("num_"): float(value) for name, value in asdict(counters).items()}
