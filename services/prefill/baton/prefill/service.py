"""The prefill service: an engine, its jobs, and what the process shows of them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import grpc

from baton.core.errors import RequestNotFound, WorkerDraining
from baton.core.handoff.frames import KvEncoding
from baton.core.roles import Role
from baton.core.sequence import SequenceSpec
from baton.engine.kv_int8 import int8_layout
from baton.handoff.push_stream import PushStream
from baton.handoff.sender import PushSender, PushTarget, SenderParts
from baton.handoff.transports.registry import SenderTransports, parse_transports
from baton.prefill.embeddings import Embeddings
from baton.prefill.jobs import Job, JobDone, Jobs
from baton.prefill.prefix import PrefixSource
from baton.prefill.servicer import PrefillServicer, register
from baton.prefill.settings import PrefillSettings
from baton.prefill.spans import Recorder
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.rpc.warm_channels import WarmChannels
from baton.wire.push import PathMeasurement, RpcPushCall, probe
from baton.worker.engine_store import EngineStore
from baton.worker.host import EngineHost

logger = logging.getLogger(__name__)
_MAX_PUSH_S = 3600.0
"""Net under pushes that make progress for ever; the caller's deadline and stalls end them first."""
_NUM_COPIERS = 2


@dataclass(frozen=True, slots=True)
class Loaded:
    """What there is once the model is loaded."""

    host: EngineHost
    jobs: Jobs
    embeddings: Embeddings
    prefix: PrefixSource


class PrefillService:
    """What `baton.rpc.process` runs."""

    def __init__(self, runtime: Runtime[PrefillSettings]) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        warm = WarmChannels(runtime.channels, frozenset({Role.DECODE}), is_bulk=True)
        runtime.members.on_change(warm.on_members)
        self._loaded: Loaded | None = None
        self._sent = runtime.metrics.counter(
            "handoff_sent_bytes", "KV bytes pushed and committed", ("transport",)
        )
        fallbacks = runtime.metrics.counter(
            "handoff_fallbacks", "Transports that were not used though wanted", ("transport", "at")
        )
        self._transports = SenderTransports(
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

    async def start(self) -> None:
        """Loads the model."""
        settings = self._settings
        host = await EngineHost.load(self._runtime, num_copiers=_NUM_COPIERS)
        if settings.kv_encoding == "int8":
            int8_layout(host.engine.fingerprint.layout)  # says so if it cannot be
        prefix = PrefixSource(host, timeout_s=settings.cache_timeout_s)
        jobs = Jobs(
            host.worker,
            prefix,
            worker_id=self._runtime.worker_id,
            hold_lease_s=settings.hold_lease_s,
            make_sender=self._make_sender,
        )
        self._loaded = Loaded(host, jobs, Embeddings(host.worker, prefix), prefix)
        host.keep_house(jobs.sweep_once)

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
        return loaded.host.snapshot(
            {
                "jobs": len(loaded.jobs),
                "holds": loaded.jobs.num_holds,
                "holds_expired": loaded.jobs.num_holds_expired,
                "fetched_blocks": loaded.prefix.num_fetched_blocks,
            },
            push_bytes_per_s=loaded.jobs.push_bytes_per_s,
        )

    async def measure_path(self, decode_worker_id: str, num_bytes: int) -> PathMeasurement:
        """What the way to a decode worker is like.

        Raises:
            RequestNotFound: no such worker is known here.
            BatonError: it cannot be reached.
        """
        member = self._runtime.members.view().get(decode_worker_id)
        if member is None or member.status.role != Role.DECODE:
            raise RequestNotFound(f"decode worker {decode_worker_id!r} is not known here")
        to = self._runtime.channels, member.status.address
        await probe(*to, 0, self._runtime.clock)  # connects
        _, round_trip_s = await probe(*to, 0, self._runtime.clock)
        num_arrived, transfer_s = await probe(*to, num_bytes, self._runtime.clock)
        return PathMeasurement(num_arrived, transfer_s, round_trip_s)

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Hashes in the prefix cache."""
        return self.loaded().host.engine.kv_snapshot()

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
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.jobs.stop_all(WorkerDraining("the worker has stopped"))
            await loaded.host.stop()
        self._transports.close()

    def connect(self, spec: SequenceSpec, target: PushTarget) -> PushStream:  # noqa: ARG002
        """Opens the stream of a sequence's push."""
        call = RpcPushCall(self._runtime.channels, target.address, _MAX_PUSH_S)
        return PushStream(call, target.address, self._transports)

    def _make_sender(self, spec: SequenceSpec, target: PushTarget) -> PushSender:
        host = self.loaded().host
        parts = SenderParts(
            store=EngineStore(host.engine),
            readers=host.copiers,
            clock=self._runtime.clock,
            progress_timeout_s=self._settings.progress_timeout_s,
            encoding=KvEncoding[self._settings.kv_encoding.upper()],
        )
        return PushSender(parts, spec, target, lambda: self.connect(spec, target))


def build(runtime: Runtime[PrefillSettings]) -> PrefillService:
    """The service of a process."""
    return PrefillService(runtime)
