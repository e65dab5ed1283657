"""The cache service in this process, over real gRPC, without a broker."""

from __future__ import annotations

import grpc

from baton.cache.answers import AnswerStore
from baton.cache.cache import CacheLimits, LocalCache
from baton.cache.metrics import make_metrics
from baton.cache.pins import Pins
from baton.cache.stores import Stores
from baton.cache.tiers import TieredStore
from baton.core.cluster import Announcement, ServiceState, ServiceStatus
from baton.core.prefix_index import PrefixIndex
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.wire.cache import add_cache
from baton.wire.clock import SystemClock

ANSWER_TTL_S = 60.0


class Cache:
    """A cache service; `now` is what its answers and pins go by."""

    def __init__(self, memory_bytes: int, *, pinned_bytes: int) -> None:
        self.store = TieredStore(memory_bytes)
        self.index = PrefixIndex()
        self.metrics = Metrics("cache", "c1", "0")
        self.now = 0.0
        self.answers = AnswerStore(4096, ANSWER_TTL_S, lambda: self.now)
        self.pins = Pins(pinned_bytes, self.store.orders, lambda: self.now)
        stores = Stores(self.store, self.answers, self.pins, self.index)
        self.local = LocalCache(
            stores,
            CacheLimits(max_prefix_blocks=64, stall_timeout_s=0.2),
            make_metrics(self.metrics, stores),
            SystemClock(),
        )
        telemetry = Telemetry("cache", "c1")
        self.server = grpc.aio.server(
            interceptors=[ServerInterceptor(telemetry, self.metrics, SystemClock())]
        )
        add_cache(self.server, self.local)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def announcement(self) -> Announcement:
        status = ServiceStatus("cache-0", "cache", self.address, state=ServiceState.READY)
        return Announcement(status, lease_s=3600.0)

    def value(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"baton_{metric}_total", labels) or 0.0
