"""The prefill service: an engine, its jobs, and what the process shows of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from baton.core.errors import QueueFull, RequestNotFound
from baton.core.handoff.frames import KvEncoding
from baton.core.roles import Role
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.kv_int8 import int8_layout
from baton.handoff.push_stream import PushStream
from baton.handoff.sender import PushReport, PushSender, SenderParts
from baton.handoff.transports.registry import SenderTransports, parse_transports
from baton.prefill.embeddings import EmbeddingRunner
from baton.prefill.jobs import Job, Jobs
from baton.prefill.prefix import PrefixSource
from baton.prefill.settings import PrefillSettings
from baton.prefill.spans import Recorder
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.rpc.warm_channels import WarmChannels
from baton.wire.orders import AttemptOrder, EmbedOrder, seq_id_of
from baton.wire.prefill import (
    PathMeasurement,
    PrefillEvent,
    PromptVector,
    PushTarget,
    add_prefill_server,
)
from baton.wire.push import RpcPushCall, probe
from baton.worker.engine_store import EngineStore
from baton.worker.host import EngineHost
from baton.worker.service import WorkerService
from baton.worker.specs import spec_of

_MAX_PUSH_S = 3600.0
"""Net under pushes that make progress for ever; the caller's deadline and stalls end them first."""


@dataclass(frozen=True, slots=True)
class PrefillParts:
    """A loaded engine, and the prompts that it computes."""

    host: EngineHost
    jobs: Jobs
    embeddings: EmbeddingRunner
    prefix: PrefixSource

    @property
    def requests(self) -> Jobs:
        """What runs here."""
        return self.jobs

    async def wait_idle(self) -> None:
        """Returns once nothing is being computed or pushed."""
        await self.jobs.wait_idle()
        await self.embeddings.wait_idle()

    async def close(self) -> None:
        """Nothing to free."""


class PrefillService(WorkerService[PrefillSettings, PrefillParts]):
    """A prefill worker; implements `wire.prefill.PrefillServer`."""

    num_copiers = 2

    def __init__(self, runtime: Runtime[PrefillSettings]) -> None:
        super().__init__(runtime)
        self._is_measuring = False
        warm = WarmChannels(runtime.channels, frozenset({Role.DECODE}), is_bulk=True)
        runtime.members.on_change(warm.on_members)
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
        return [add_prefill_server(server, self)]

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

    async def stop(self) -> None:
        """Ends what still runs and unloads the model."""
        await super().stop()
        self._transports.close()

    async def prefill(
        self, order: AttemptOrder, target: PushTarget | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """Computes a prompt and pushes its KV."""
        loaded = self.admitting()
        spec = spec_of(loaded.host.engine, order, prefill_only=True)
        await loaded.host.worker.prepare(spec.sampling.guide)
        target_id = target.worker_id if target else ""
        recorder = Recorder(self._runtime.telemetry, order, target_id, self._count)
        job = Job(order.request_id, order.attempt, spec, target, recorder)
        async with aclosing(loaded.jobs.run(job)) as events:
            async for event in events:
                yield event

    async def embed(self, order: EmbedOrder) -> PromptVector:
        """Computes a prompt for its vector."""
        loaded = self.admitting()
        spec = SequenceSpec(
            seq_id=seq_id_of(order),
            token_ids=order.token_ids,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=1,
            priority=order.priority,
            cache_salt=order.cache_salt,
            pooling=order.pooling,
        )
        return await loaded.embeddings.embed(spec)

    async def release(self, request_id: str, attempt: int) -> int:
        """Lets go of kept copies."""
        return self.loaded().jobs.release(request_id, attempt)

    async def measure_path(self, decode_worker_id: str, num_bytes: int) -> PathMeasurement:
        """Sends bytes to a decode worker and says how long that took.

        Raises:
            QueueFull: another path is being measured.
            RequestNotFound: no such worker is known here.
            BatonError: it cannot be reached.
        """
        if self._is_measuring:
            raise QueueFull("another path is being measured, which this would disturb")
        self._is_measuring = True
        try:
            return await self._measure(decode_worker_id, num_bytes)
        finally:
            self._is_measuring = False

    async def _measure(self, decode_worker_id: str, num_bytes: int) -> PathMeasurement:
        member = self._runtime.members.view().get(decode_worker_id)
        if member is None or member.status.role != Role.DECODE:
            raise RequestNotFound(f"decode worker {decode_worker_id!r} is not known here")
        to, clock = (self._runtime.channels, member.status.address), self._runtime.clock
        await probe(*to, 0, clock)  # connects
        _, round_trip_s = await probe(*to, 0, clock)
        num_arrived, transfer_s = await probe(*to, num_bytes, clock)
        return PathMeasurement(num_arrived, transfer_s, round_trip_s)

    def make_parts(self, host: EngineHost) -> PrefillParts:
        """Jobs, and where prefixes come from."""
        if self._settings.kv_encoding == "int8":
            int8_layout(host.engine.fingerprint.layout)  # says so if it cannot be
        prefix = PrefixSource(host, self._runtime.clock, timeout_s=self._settings.cache_timeout_s)
        jobs = Jobs(
            host.worker,
            prefix,
            worker_id=self._runtime.worker_id,
            hold_lease_s=self._settings.hold_lease_s,
            clock=self._runtime.clock,
            make_sender=self._make_sender,
        )
        embeddings = EmbeddingRunner(host.worker, prefix, self._runtime.clock)
        return PrefillParts(host, jobs, embeddings, prefix)

    def _count(self, report: PushReport) -> None:
        self._sent.labels(report.transport).inc(report.num_bytes)
        self._transfer_s.observe(report.transfer_s)

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
