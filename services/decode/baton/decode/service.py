"""The decode service: an engine, its sessions and pushes, and what the process shows of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from baton.core.errors import BatonError, Cancelled
from baton.core.handoff.frames import KvEncoding, PushAnswer, PushFrame
from baton.core.output import TokenBatch
from baton.decode import spans
from baton.decode.sessions import Session, Sessions
from baton.decode.settings import DecodeSettings
from baton.handoff.receiver import Intake
from baton.handoff.transports.registry import ReceiverTransports, parse_transports
from baton.rpc.runtime import Runtime, ServiceSnapshot
from baton.wire.decode import KvReservation, LeaseRenewal, add_decode_server
from baton.wire.orders import AttemptOrder
from baton.wire.push import add_push_server
from baton.worker.engine_store import EngineStore
from baton.worker.host import EngineHost
from baton.worker.service import WorkerService
from baton.worker.specs import spec_of


@dataclass(frozen=True, slots=True)
class DecodeParts:
    """A loaded engine, its sessions, and the pushes into them."""

    host: EngineHost
    sessions: Sessions
    intake: Intake[Session]

    @property
    def requests(self) -> Sessions:
        """What runs here."""
        return self.sessions

    async def wait_idle(self) -> None:
        """Returns once there is no session."""
        await self.sessions.wait_idle()

    async def close(self) -> None:
        """Frees the memory that pushes arrive in."""
        await asyncio.to_thread(self.intake.close)


class DecodeService(WorkerService[DecodeSettings, DecodeParts]):
    """A decode worker; implements `wire.decode.DecodeServer`."""

    def __init__(self, runtime: Runtime[DecodeSettings]) -> None:
        super().__init__(runtime)
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
            add_decode_server(server, self),
            add_push_server(server, self, self._runtime.clock),
        ]

    def snapshot(self) -> ServiceSnapshot:
        """Load and blocks now."""
        loaded = self.loaded()
        return loaded.host.snapshot({
            "reservations": len(loaded.sessions),
            "leases_expired": loaded.sessions.num_leases_expired,
        })

    async def reserve(self, order: AttemptOrder) -> KvReservation:
        """Reserves room for an attempt."""
        loaded = self.admitting()
        spec = spec_of(loaded.host.engine, order)
        await loaded.host.worker.prepare(spec.sampling.guide)
        session = loaded.sessions.reserve(
            spec, order.request_id, order.attempt, fork_of=order.fork_of
        )
        return KvReservation(
            reservation_id=session.reservation.reservation_id,
            epoch=session.reservation.epoch,
            lease_s=loaded.sessions.lease_s,
            num_blocks=session.grant.num_blocks,
            num_cached_blocks=session.grant.num_cached_blocks,
            push_address=self._runtime.address,
        )

    async def decode(
        self, reservation_id: str, epoch: int, *, local_prefill: bool
    ) -> AsyncGenerator[TokenBatch, None]:
        """Runs a reserved attempt to its end."""
        sessions = self.loaded().sessions
        session = sessions.attach(reservation_id, epoch)
        parent = self._runtime.telemetry.current_context()
        try:
            stream = sessions.stream(session, local_prefill=local_prefill)
            async with aclosing(stream) as batches:
                async for batch in batches:
                    yield batch
        except BatonError as error:
            sessions.release(session, error)
            raise
        finally:
            sessions.release(session, Cancelled("the reader of the tokens went away"))
            spans.record(self._runtime.telemetry, session, parent, self._runtime.clock.now())

    async def release(self, reservation_id: str, request_id: str, reason: str) -> int:
        """Ends reservations."""
        return self.loaded().sessions.release_named(reservation_id, request_id, reason)

    async def renew_leases(self, reservation_ids: Sequence[str]) -> LeaseRenewal:
        """Extends leases."""
        sessions = self.loaded().sessions
        return LeaseRenewal(sessions.lease_s, tuple(sessions.renew(reservation_ids)))

    def receive(self, frames: AsyncIterator[PushFrame]) -> AsyncGenerator[PushAnswer, None]:
        """Serves one push."""
        return self.loaded().intake.receive(frames)

    def push_ended(self, num_bytes: int, error: BatonError | None) -> None:
        """Counts a push that ended."""
        self._received.inc(num_bytes)
        if error is not None:
            self._refused.labels(error.reason.name).inc()

    def make_parts(self, host: EngineHost) -> DecodeParts:
        """Sessions, and pushes into them."""
        settings = self._settings
        sessions = Sessions(
            host.worker,
            lease_s=settings.reservation_lease_s,
            progress_timeout_s=settings.progress_timeout_s,
            rng=self._runtime.rng,
            clock=self._runtime.clock,
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
        return DecodeParts(host, sessions, intake)

    def _on_end(self, session: Session, outcome: str) -> None:
        """Counts the end, and offers prompt and output to the cache for the next turn."""
        self._ended.labels(outcome).inc()
        self._draft_tokens.inc(session.num_draft_tokens)
        self._accepted_tokens.inc(session.num_accepted_tokens)
        loaded = self._loaded
        # The store's blocks are exact: KV of a rounded hand-off stays here.
        if loaded is not None and session.output_ids and not loaded.intake.has_rounded_kv:
            # The last token has not been through the model: it has no KV.
            loaded.host.write_back.offer(
                loaded.host.engine.block_hashes(session.spec, session.output_ids[:-1])
            )


def build(runtime: Runtime[DecodeSettings]) -> DecodeService:
    """The service of a process."""
    return DecodeService(runtime)
