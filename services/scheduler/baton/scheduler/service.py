"""The scheduler's parts, put together for its process."""

from __future__ import annotations

import asyncio
import logging

import grpc

from baton.core.roles import Role
from baton.rpc.cache_access import CacheAccess, rpc_caches
from baton.rpc.kv_index_feed import KvIndexFeed
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.rpc.warm_channels import WarmChannels
from baton.scheduler.attempt import SchedulerDeps
from baton.scheduler.embeddings import Embedder
from baton.scheduler.front import Callers, SchedulerFront
from baton.scheduler.gate import Entrance
from baton.scheduler.oip.servicer import OpenInferenceServicer, add_open_inference_servicer
from baton.scheduler.orchestrator import Orchestrator
from baton.scheduler.peer_calls import Encoder, Peers, WorkerHolds
from baton.scheduler.relay import Answers
from baton.scheduler.request_timeline import StageSpans
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.settings import SchedulerSettings
from baton.scheduler.text import TextRelay
from baton.scheduler.view import ClusterWatch
from baton.wire.inference.serving import add_inference_server

logger = logging.getLogger(__name__)

_RELEASE_WAIT_S = 3.0
_CALLED_ROLES = frozenset({Role.TOKENIZER, Role.PREFILL, Role.DECODE, Role.CACHE})


class SchedulerService:
    """A scheduler, as `rpc.process` runs it."""

    def __init__(self, runtime: Runtime[SchedulerSettings]) -> None:
        settings = runtime.settings
        callers = Callers(settings.make_tenants(), settings.plain_gateway_key, runtime.clock)
        runtime.lifecycle.guard = callers.refusal
        _warn_of_missing_key(settings)
        self._runtime = runtime
        self._prefixes = KvIndexFeed(runtime.control, runtime.members.view, runtime.clock)
        cluster = ClusterWatch(
            runtime.members, self._prefixes.index, runtime.clock, own_id=runtime.worker_id
        )
        peers = Peers(runtime.channels, runtime.clock)
        self._holds = WorkerHolds(runtime.clock)
        self._text = TextRelay(
            lambda address: peers.tokenizer(address).stream_text(),
            lambda model, avoid: cluster.tokenizer(model, avoid).status.address,
            cluster.suspect_address,
            runtime.clock,
        )
        encoder = Encoder(cluster, peers, settings.tokenizer_timeout_s)
        metrics = SchedulerMetrics(runtime.metrics)
        cache = CacheAccess(runtime.members.view, rpc_caches(runtime.channels), runtime.clock.now)
        self._answers = Answers(cluster, cache, runtime.metrics, settings.cache_timeout_s)
        deps = SchedulerDeps(
            settings=settings,
            cluster=cluster,
            peers=peers,
            encoder=encoder,
            text=self._text,
            answers=self._answers,
            holds=self._holds,
            entrance=Entrance(settings.max_live_requests),
            spans=StageSpans(runtime.telemetry),
            metrics=metrics,
            clock=runtime.clock,
            rng=runtime.rng,
        )
        self._orchestrator = Orchestrator(deps)
        runtime.metrics.gauge_at_scrape(
            "members_refused",
            "Workers that do not compute what their model's others do",
            "role",
            cluster.num_refused,
        )
        self._embedder = Embedder(deps)
        runtime.members.on_change(lambda _: self._orchestrator.cluster_changed())
        runtime.members.on_change(WarmChannels(runtime.channels, _CALLED_ROLES).on_members)
        self._front = SchedulerFront(
            self._orchestrator,
            self._embedder,
            cache,
            lambda: runtime.bus.is_connected,
            deps,
        )
        self._open_servicer = OpenInferenceServicer(self._orchestrator, deps)

    def register(self, server: grpc.aio.Server) -> list[str]:
        """See `runtime.Service`."""
        return [
            add_inference_server(server, self._front),
            add_open_inference_servicer(self._open_servicer, server),
        ]

    async def start(self) -> None:
        """See `runtime.Service`."""
        await self._prefixes.start(self._runtime.bus, self._runtime.members)

    def snapshot(self) -> ServiceSnapshot:
        """See `runtime.Service`."""
        states = self._orchestrator.requests_by_state()
        return ServiceSnapshot(
            num_running=self._orchestrator.num_running + self._embedder.num_running,
            num_waiting=self._orchestrator.num_waiting,
            stats={f"requests_{state}": float(count) for state, count in states.items()},
        )

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """A scheduler has no KV."""
        return 0, []

    async def drain(self, grace_s: float) -> None:
        """See `runtime.Service`."""
        await asyncio.gather(self._orchestrator.drain(grace_s), self._embedder.drain(grace_s))
        await self._holds.finish(_RELEASE_WAIT_S)

    async def stop(self) -> None:
        """See `runtime.Service`."""
        await self._orchestrator.drain(0.0)
        await self._orchestrator.close()
        await self._holds.close(_RELEASE_WAIT_S)
        await self._answers.close()
        await self._text.close()
        await self._prefixes.close()


def _warn_of_missing_key(settings: SchedulerSettings) -> None:
    if (settings.api_keys or settings.tenants_file) and not settings.plain_gateway_key:
        logger.warning("gateways will be refused: callers need keys, and gateway_key is not set")
