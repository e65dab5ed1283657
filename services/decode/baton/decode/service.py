"""The decode service: an engine, its sessions and pushes, and what the process shows of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import grpc
from opentelemetry.context import Context

from baton.core.errors import BatonError, WorkerDraining
from baton.core.handoff.frames import KvEncoding, PushAnswer, PushFrame
from baton.decode import spans
from baton.decode.servicer import DecodeServicer, register
from baton.decode.sessions import Session, Sessions
from baton.decode.settings import DecodeSettings
from baton.handoff.receiver import Intake
from baton.handoff.transports.registry import ReceiverTransports, parse_transports
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.wire.push import add_push_server
from baton.worker.engine_store import EngineStore
from baton.worker.host import EngineHost

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What there is once the model is loaded."""

    host: EngineHost
    sessions: Sessions
    intake: Intake[Session]


class DecodeService:
    """What `baton.rpc.process` runs."""

    def __init__(self, runtime: Runtime[DecodeSettings]) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._loaded: Loaded | None = None
        self._ended = runtime.metrics.counter(
            "decode_sessions", "Reservations that ended, by how", ("outcome",)
        )
        self._received = runtime.metrics.counter(
            "handoff_received_bytes", "KV bytes received and verified"
        )
        self._draft_tokens = runtime.metrics.counter(
            "draft_tokens", "Draft tokens proposed for requests that ended"
        )
        self._accepted_tokens = runtime.metrics.counter(
            "draft_accepted_tokens", "Draft tokens that the target accepted"
        )
        self._refused = runtime.metrics.counter(
            "handoff_refused", "Pushes that ended in an error", ("reason",)
        )

    def register(self, server: grpc.aio.Server) -> list[str]:
        """Adds DecodeService and KvTransferService."""
        return [
            register(server, DecodeServicer(self)),
            add_push_server(server, self, self._runtime.clock),
        ]

    async def start(self) -> None:
        """Loads the model."""
        settings = self._settings
        host = await EngineHost.load(self._runtime, num_copiers=1)
        sessions = Sessions(
            host.worker,
            lease_s=settings.reservation_lease_s,
            progress_timeout_s=settings.progress_timeout_s,
            rng=self._runtime.rng,
            on_end=self._on_end,
            encodings=frozenset(KvEncoding if settings.take_int8_kv else [KvEncoding.NATIVE]),
        )
        intake = Intake(
            EngineStore(host.engine),
            sessions,
            ReceiverTransports(parse_transports(settings.kv_transports), settings.transport_bytes),
            num_credits=settings.credits,
            progress_timeout_s=settings.progress_timeout_s,
            clock=self._runtime.clock,
        )
        self._loaded = Loaded(host, sessions, intake)
        host.keep_house(sessions.sweep_once)

    def loaded(self) -> Loaded:
        """Engine and sessions, for calls that continue what was begun.

        Raises:
            WorkerDraining: they are not there yet, or not any more.
        """
        if self._loaded is None:
            raise WorkerDraining("the worker is not ready")
        return self._loaded

    def admitting(self) -> Loaded:
        """Engine and sessions, for calls that begin something.

        Raises:
            WorkerDraining: nothing new is taken.
        """
        if self._runtime.is_draining:
            raise WorkerDraining("the worker is draining: take another one")
        return self.loaded()

    @property
    def address(self) -> str:
        """Where pushes go."""
        return self._runtime.address

    def context(self) -> Context:
        """The trace context of the call being served."""
        return self._runtime.telemetry.current_context()

    def record(self, session: Session, parent: Context) -> None:
        """Records a finished Decode call's stages."""
        spans.record(self._runtime.telemetry, session, parent, time.monotonic())

    def receive(self, frames: AsyncIterator[PushFrame]) -> AsyncGenerator[PushAnswer, None]:
        """Serves one push."""
        return self.loaded().intake.receive(frames)

    def push_ended(self, num_bytes: int, error: BatonError | None) -> None:
        """Counts a push that ended."""
        self._received.inc(num_bytes)
        if error is not None:
            self._refused.labels(error.reason.name).inc()

    def snapshot(self) -> ServiceSnapshot:
        """Load and blocks now."""
        loaded = self.loaded()
        return loaded.host.snapshot({
            "reservations": len(loaded.sessions),
            "leases_expired": loaded.sessions.num_leases_expired,
        })

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Hashes in the prefix cache."""
        return self.loaded().host.engine.kv_snapshot()

    async def drain(self, grace_s: float) -> None:
        """Waits for running requests; those that are left go on elsewhere."""
        if self._loaded is None:
            return
        sessions = self._loaded.sessions
        try:
            async with asyncio.timeout(grace_s):
                await sessions.wait_idle()
        except TimeoutError:
            logger.warning("drain cut off", extra={"num_sessions": len(sessions)})
        finally:  # a drain that is cut short leaves by here too
            sessions.release_all(WorkerDraining("the worker stops, and its grace is over"))

    async def stop(self) -> None:
        """Ends what still runs and unloads the model."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.sessions.release_all(WorkerDraining("the worker has stopped"))
            await asyncio.to_thread(loaded.intake.close)
            await loaded.host.stop()

    def _on_end(self, session: Session, outcome: str) -> None:
        """Counts the end, and offers prompt and output to the cache for the next turn."""
        self._ended.labels(outcome).inc()
        self._draft_tokens.inc(session.num_draft_tokens)
        self._accepted_tokens.inc(session.num_accepted_tokens)
        loaded = self._loaded
        # The store's blocks are exact: what came from a rounded hand-off stays here.
        if loaded is not None and session.output_ids and not loaded.intake.has_rounded_kv:
            # The last token has not been through the model: it has no KV.
            loaded.host.write_back.offer(
                loaded.host.engine.block_hashes(session.spec, session.output_ids[:-1])
            )


def build(runtime: Runtime[DecodeSettings]) -> DecodeService:
    """The service of a process."""
    return DecodeService(runtime)
