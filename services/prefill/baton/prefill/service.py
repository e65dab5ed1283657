"""The prefill service: an engine, its jobs, and what the process shows of them."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from baton.core.cluster import ClusterView, WorkerRates
from baton.core.errors import RequestNotFound, WorkerDraining
from baton.core.handoff import KvEncoding
from baton.core.sequence import SequenceSpec
from baton.engine.engine import Engine
from baton.engine.kv_int8 import int8_layout
from baton.engine.worker import EngineWorker
from baton.prefill.embeddings import Embeddings
from baton.prefill.faults import NO_FAULTS, FaultPlan, Faults, FaultyCall
from baton.prefill.handoff import Push, PushTarget
from baton.prefill.jobs import Job, JobDone, Jobs
from baton.prefill.peers import Path, PushCall, measure_path
from baton.prefill.prefix import PrefixSource
from baton.prefill.servicer import PrefillServicer, register
from baton.prefill.settings import PrefillSettings
from baton.prefill.spans import Recorder
from baton.prefill.transports import Transports
from baton.rpc.cache_access import CacheAccess
from baton.rpc.convert import KvEvent, kv_event_to_bytes
from baton.rpc.frames import check_kv_frames
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.rpc.shared_memory import parse_transports
from baton.rpc.write_back import WriteBack

logger = logging.getLogger(__name__)
_HOUSEKEEPING_INTERVAL_S = 0.05
_MAX_PUSH_S = 3600.0
"""Net under pushes that make progress for ever; the caller's deadline and stalls end them first."""
_NUM_READERS = 2


@dataclass(frozen=True, slots=True)
class Loaded:
    """What there is once the model is loaded."""

    worker: EngineWorker
    jobs: Jobs
    embeddings: Embeddings
    prefix: PrefixSource
    cache: CacheAccess
    write_back: WriteBack
    executor: ThreadPoolExecutor

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.worker.engine


class PrefillService:
    """What `baton.rpc.process` runs."""

    def __init__(self, runtime: Runtime[PrefillSettings]) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._faults = FaultPlan(runtime.settings.fault)
        runtime.members.on_change(self._warm_channels)
        self._loaded: Loaded | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sent = runtime.metrics.counter(
            "handoff_sent_bytes", "KV bytes pushed and committed", ("transport",)
        )
        fallbacks = runtime.metrics.counter(
            "handoff_fallbacks", "Transports that were not used though wanted", ("transport", "at")
        )
        self._transports = Transports(
            parse_transports(runtime.settings.kv_transports),
            clock=runtime.clock,
            on_fallback=lambda name, at: fallbacks.labels(name, at).inc(),
        )
        self._transfer_s = runtime.metrics.histogram(
            "handoff_duration_seconds", "From a push's first chunk to its commit"
        )

    def register(self, server: grpc.aio.Server) -> list[str]:
        """Adds PrefillService."""
        return register(server, PrefillServicer(self))

    def _warm_channels(self, view: ClusterView) -> None:
        for member in view:
            if member.status.role == "decode":
                self._runtime.channels.warm(member.status.address, is_bulk=True)

    async def start(self) -> None:
        """Loads the model."""
        settings = self._settings
        if self._faults.is_on:
            logger.warning("prompts go wrong on purpose", extra={"fault": settings.fault})
        worker = await EngineWorker.start(settings.engine_config(), self._runtime.report_progress)
        check_kv_frames(worker.engine.fingerprint.layout, settings.max_message_bytes)
        if settings.kv_encoding == "int8":
            int8_layout(worker.engine.fingerprint.layout)  # says so if it cannot be
        executor = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="baton-transfer")
        cache = CacheAccess(self._runtime.members.view, self._runtime.channels, self._runtime.clock)
        write_back = WriteBack(worker.engine, cache, executor, settings.write_back_queue_blocks)
        prefix = PrefixSource(
            worker.engine, cache, write_back, executor, timeout_s=settings.cache_timeout_s
        )
        jobs = Jobs(
            worker,
            prefix,
            worker_id=self._runtime.worker_id,
            hold_lease_s=settings.hold_lease_s,
            make_push=self._make_push,
            next_faults=self._faults.next,
        )
        self._loaded = Loaded(
            worker, jobs, Embeddings(worker, prefix), prefix, cache, write_back, executor
        )
        self._tasks = [
            asyncio.create_task(write_back.run(), name="write back"),
            asyncio.create_task(self._keep_house(self._loaded), name="housekeeping"),
        ]

    def loaded(self) -> Loaded:
        """Engine and jobs, for calls that continue what was begun.

        Raises:
            WorkerDraining: they are not there yet, or not any more.
        """
        if self._loaded is None:
            raise WorkerDraining("the worker is not ready")
        return self._loaded

    def admitting(self) -> Loaded:
        """Engine and jobs, for calls that begin something.

        Raises:
            WorkerDraining: nothing new is taken.
        """
        if self._runtime.is_draining:
            raise WorkerDraining("the worker is draining: take another one")
        return self.loaded()

    def recorder(self, job: Job) -> Recorder:
        """Records the spans of a job asked for by the call being served."""
        telemetry = self._runtime.telemetry
        return Recorder(telemetry, job, telemetry.current_context())

    def count(self, done: JobDone) -> None:
        """Counts a job that ended well."""
        if done.report is not None:
            self._sent.labels(done.report.transport).inc(done.report.num_bytes)
            self._transfer_s.observe(done.report.ended_at_s - done.report.began_at_s)

    def snapshot(self) -> ServiceSnapshot:
        """Load and blocks now."""
        loaded = self.loaded()
        stats = loaded.engine.stats()
        fingerprint = loaded.engine.fingerprint
        return ServiceSnapshot(
            model=fingerprint.model,
            fingerprint=fingerprint,
            kv_blocks=loaded.engine.kv_counts(),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            stats={
                **stats.counters,
                "num_kv_blocks": loaded.engine.num_kv_blocks,
                "jobs": len(loaded.jobs),
                "holds": loaded.jobs.num_holds,
                "holds_expired": loaded.jobs.num_holds_expired,
                "fetched_blocks": loaded.prefix.num_fetched_blocks,
                "stored_blocks": loaded.write_back.num_stored_blocks,
                "dropped_blocks": loaded.write_back.num_dropped_blocks,
                "cache_failures": loaded.cache.num_failures,
                "max_model_len_tokens": loaded.engine.max_model_len_tokens,
            },
            rates=WorkerRates(
                prefill_tokens_per_s=stats.prefill_tokens_per_s,
                decode_step_s=stats.decode_step_s,
                queued_prefill_tokens=stats.queued_prefill_tokens,
                push_bytes_per_s=loaded.jobs.push_bytes_per_s,
                max_num_seqs=self._settings.max_num_seqs,
            ),
        )

    async def measure_path(self, decode_worker_id: str, num_bytes: int) -> Path:
        """What the way to a decode worker is like.

        Raises:
            RequestNotFound: no such worker is known here.
            BatonError: it cannot be reached.
        """
        member = self._runtime.members.view().get(decode_worker_id)
        if member is None or member.status.role != "decode":
            raise RequestNotFound(f"decode worker {decode_worker_id!r} is not known here")
        return await measure_path(self._runtime.channels, member.status.address, num_bytes)

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Hashes in the prefix cache."""
        return self.loaded().engine.kv_snapshot()

    async def drain(self, grace_s: float) -> None:
        """Waits for running jobs, their pushes included; those that are left go on elsewhere."""
        if self._loaded is None:
            return
        jobs = self._loaded.jobs
        try:
            async with asyncio.timeout(grace_s):
                await jobs.wait_idle()
                await self._loaded.embeddings.wait_idle()
        except TimeoutError:
            logger.warning("drain cut off", extra={"num_jobs": len(jobs)})
        finally:  # a drain that is cut short leaves by here too
            jobs.stop_all(WorkerDraining("the worker stops, and its grace is over"))

    async def stop(self) -> None:
        """Ends what still runs and unloads the model."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.jobs.stop_all(WorkerDraining("the worker has stopped"))
            await asyncio.to_thread(loaded.executor.shutdown)
            await loaded.worker.stop()
        self._transports.close()

    def _make_push(self, spec: SequenceSpec, target: PushTarget, faults: Faults) -> Push:
        loaded = self.loaded()

        def connect() -> PushCall:
            call = PushCall(
                self._runtime.channels,
                target.address,
                timeout_s=_MAX_PUSH_S,
                transports=self._transports,
            )
            return call if faults == NO_FAULTS else FaultyCall(call, faults)

        return Push(
            loaded.engine,
            spec,
            target,
            connect=connect,
            readers=loaded.executor,
            progress_timeout_s=self._settings.progress_timeout_s,
            encoding=KvEncoding[self._settings.kv_encoding.upper()],
        )

    async def _keep_house(self, loaded: Loaded) -> None:
        """Ends leases, publishes changes of the prefix cache, and notices a dead engine."""
        subject = f"baton.kv.{self._runtime.worker_id}"
        while loaded.worker.is_alive:
            loaded.jobs.sweep_once(time.monotonic())
            for change in loaded.engine.drain_kv_events():
                event = KvEvent(
                    self._runtime.worker_id, change.sequence, change.stored, change.removed
                )
                await self._runtime.bus.publish(subject, kv_event_to_bytes(event))
            await asyncio.sleep(_HOUSEKEEPING_INTERVAL_S)
        logger.error("engine stopped; the process exits")
        self._runtime.request_stop(exit_code=1, grace_s=0.0)


def build(runtime: Runtime[PrefillSettings]) -> PrefillService:
    """The service of a process."""
    return PrefillService(runtime)
