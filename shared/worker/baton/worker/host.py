"""An engine inside a worker's process: loaded, tied to bus and cache service, unloaded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from baton.core.cluster import WorkerRates
from baton.core.subjects import kv_events_of
from baton.engine.engine import Engine
from baton.engine.worker import EngineWorker
from baton.rpc.cache_access import CacheAccess, rpc_caches
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.rpc.tasks import Tasks
from baton.wire.announcement import KvEvent, kv_event_to_bytes
from baton.wire.frames import check_kv_frames
from baton.worker.settings import WorkerSettings
from baton.worker.write_back import WriteBack

logger = logging.getLogger(__name__)
_HOUSEKEEPING_INTERVAL_S = 0.05
_HUNG_STEP_S = 300.0
"""Far beyond the longest step, a full batch at the end of a long context on a slow CPU."""


class EngineHost:
    """A loaded engine with what serves it. Made by `load`."""

    def __init__(
        self, runtime: Runtime[WorkerSettings], worker: EngineWorker, num_copiers: int
    ) -> None:
        self._runtime = runtime
        self._tasks = Tasks("engine host", runtime.lifecycle.fail)
        self.worker = worker
        self.copiers = ThreadPoolExecutor(num_copiers, thread_name_prefix="baton-kv-copy")
        """Threads that copy KV of blocks which no step writes to."""
        self.cache = CacheAccess(
            runtime.members.view, rpc_caches(runtime.channels), runtime.clock.now
        )
        self.write_back = WriteBack(
            worker.engine, self.cache, self.copiers, runtime.settings.write_back_queue_blocks
        )

    @classmethod
    async def load(cls, runtime: Runtime[WorkerSettings], *, num_copiers: int) -> EngineHost:
        """Loads the model and reports the progress.

        Raises:
            ModelNotFound, Unsupported, InvalidRequest: it cannot be served.
        """
        settings = runtime.settings
        worker = await EngineWorker.start(settings.engine_config(), runtime.report_progress)
        check_kv_frames(worker.engine.fingerprint.layout, settings.max_message_bytes)
        return cls(runtime, worker, num_copiers)

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.worker.engine

    def keep_house(self, sweep: Callable[[float], None]) -> None:
        """Starts the background tasks: write-back, lease sweeps, KV events, engine watchdog.

        `sweep(now)` ends leases.
        """
        self._tasks.spawn(self.write_back.run(), "write back")
        self._tasks.spawn(self._keep_house(sweep), "housekeeping")

    def snapshot(
        self, own_stats: Mapping[str, float], *, push_bytes_per_s: float = 0.0
    ) -> ServiceSnapshot:
        """Load and blocks now; `own_stats` are the service's counts."""
        stats = self.engine.stats()
        fingerprint = self.engine.fingerprint
        return ServiceSnapshot(
            model=fingerprint.model,
            max_model_len_tokens=self.engine.max_model_len_tokens,
            fingerprint=fingerprint,
            kv_blocks=self.engine.kv_counts(),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            stats={
                **stats.counters,
                "num_kv_blocks": self.engine.num_kv_blocks,
                "step_age_s": self.engine.step_age_s,
                "stored_blocks": self.write_back.num_stored_blocks,
                "dropped_blocks": self.write_back.num_dropped_blocks,
                "cache_failures": self.cache.num_failures,
                **own_stats,
            },
            rates=WorkerRates(
                prefill_tokens_per_s=stats.prefill_tokens_per_s,
                decode_step_s=stats.decode_step_s,
                queued_prefill_tokens=stats.queued_prefill_tokens,
                push_bytes_per_s=push_bytes_per_s,
                max_num_seqs=self._runtime.settings.max_num_seqs,
            ),
        )

    async def stop(self) -> None:
        """Unloads the model; no request may run on it now."""
        await self._tasks.stop()
        await asyncio.to_thread(self.copiers.shutdown)
        await self.worker.stop()

    async def _keep_house(self, sweep: Callable[[float], None]) -> None:
        """Runs until the engine dies; then the process must end."""
        clock = self._runtime.clock
        subject = kv_events_of(self._runtime.worker_id)
        while self.worker.is_alive and self.engine.step_age_s < _HUNG_STEP_S:
            sweep(clock.now())
            for change in self.engine.drain_kv_events():
                event = KvEvent(
                    self._runtime.worker_id, change.sequence, change.stored, change.removed
                )
                await self._runtime.bus.publish(subject, kv_event_to_bytes(event))
            await clock.sleep(_HOUSEKEEPING_INTERVAL_S)
        logger.error(
            "engine stopped or hangs; the process exits",
            extra={"step_age_s": self.engine.step_age_s},
        )
        self._runtime.request_stop(exit_code=1, grace_s=0.0)
