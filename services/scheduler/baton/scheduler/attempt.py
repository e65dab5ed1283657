"""One attempt at a request on one placement: reserve, prefill, decode; whatever happens, let go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random

from baton.core.blame import Complaint, Culprit, Fact, blame
from baton.core.clock import Clock
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    ErrorReason,
    Internal,
    NoWorker,
    QueueFull,
    Stalled,
)
from baton.core.output import TokenBatch
from baton.core.placement import Placement
from baton.core.request import RequestStatus
from baton.core.roles import Role
from baton.core.stages import StageName
from baton.scheduler.gate import Entrance
from baton.scheduler.live import LiveRequest
from baton.scheduler.peer_calls import Encoder, Peers, WorkerHolds
from baton.scheduler.placer import AttemptFailed
from baton.scheduler.relay import Answers, OutputRelay
from baton.scheduler.request_timeline import AttemptTimeline, StageSpans
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.settings import SchedulerSettings
from baton.scheduler.text import TextRelay
from baton.scheduler.view import ClusterWatch
from baton.wire.clock import ended_within
from baton.wire.decode import KvReservation
from baton.wire.inference.chunks import PlacementTaken
from baton.wire.orders import AttemptOrder
from baton.wire.prefill import FirstToken, PrefillDone, PrefillEvent, PrefillStarted, PushTarget
from baton.wire.streams import AnswerStream, Silent


@dataclass(frozen=True, slots=True)
class SchedulerDeps:
    """Collaborators of the orchestrator and of every attempt."""

    settings: SchedulerSettings
    cluster: ClusterWatch
    peers: Peers
    encoder: Encoder
    text: TextRelay
    answers: Answers
    holds: WorkerHolds
    entrance: Entrance
    spans: StageSpans
    metrics: SchedulerMetrics
    clock: Clock
    rng: Random


_SLOWEST_PREFILL_TOKENS_PER_S = 100.0
_COMMIT_GRACE_S = 1.0
"""If P is lost, the KV may be committed already; D then sends a token within this time."""
_LAST_WORD_S = 0.2
_DEADLINE_SLACK_S = 0.05


class Attempt:
    """Runs once. Leaving `run` releases everything that the attempt holds at its workers."""

    def __init__(
        self,
        live: LiveRequest,
        placement: Placement,
        order: AttemptOrder,
        relay: OutputRelay,
        deps: SchedulerDeps,
        *,
        number: int,
        prefilled: Callable[[], None],
    ) -> None:
        """`number` is what the caller reads as `attempts`; `prefilled` is called once."""
        self._live = live
        self._placement = placement
        self._order = order
        self._relay = relay
        self._deps = deps
        self._number = number
        self._prefilled = prefilled
        self._timeline = AttemptTimeline(live.timeline, placement)
        self._decode_id = placement.decode.worker_id
        self._decode_peer = deps.peers.decode(placement.decode)
        self._prefill_peer = deps.peers.prefill(placement.prefill) if placement.prefill else None
        self._held = ExitStack()
        """Cancels the calls, then releases what the workers may hold; never waits."""
        self._outcome = "failed"
        self._reservation: KvReservation | None = None
        self._may_hold_copy = False
        self._prefill_cached_tokens = 0
        self._has_tokens = False
        """The decode worker has sent tokens in this attempt."""

    async def run(self) -> None:
        """Returns when the output has ended.

        Raises:
            AttemptFailed: a worker failed; the request can go on with another attempt.
            BatonError: the request itself failed.
        """
        with self._held:
            try:
                reservation = await self._reserve()
                if self._placement.prefill is None:
                    await self._run_local(reservation)
                else:
                    await self._run_disaggregated(reservation)
                self._outcome = "finished"
            except asyncio.CancelledError:
                self._outcome = "cancelled"
                raise

    async def _reserve(self) -> KvReservation:
        live = self._live
        with (
            self._deps.spans.stage(StageName.RESERVE, {"baton.worker_id": self._decode_id}) as span,
            self._blaming(StageName.RESERVE),
        ):
            timeout_s = self._bound_s(self._deps.settings.reserve_timeout_s)
            self._held.callback(self._release_blocks)
            try:
                reservation = await self._decode_peer.reserve(self._order, timeout_s)
            except BatonError as error:
                # After silence or a broken connection D may hold blocks. Any other error is a
                # refusal: D holds none, so the release is dropped.
                if error.reason not in {ErrorReason.NO_WORKER, ErrorReason.DEADLINE}:
                    self._held.pop_all()
                raise
            span.set_attribute("baton.num_blocks", reservation.num_blocks)
            span.set_attribute("baton.num_cached_blocks", reservation.num_cached_blocks)
        self._reservation = reservation
        self._timeline.reserved()
        live.state.transition(RequestStatus.RESERVED, live.clock.now())
        self._note_placement()
        return reservation

    async def _run_local(self, reservation: KvReservation) -> None:
        live = self._live
        with self._deps.spans.stage(
            StageName.DECODE, {"baton.worker_id": self._decode_id, "baton.local_prefill": True}
        ):
            decode = self._start_decode(reservation, is_local=True)
            live.state.transition(RequestStatus.DECODING, live.clock.now())
            batch = await self._next_batch(decode, self._prefill_bound_s())
            self._prefilled()
            live.prompt_kv.computed_at(self._decode_id)
            if timings := batch.timings:
                self._prefill_cached_tokens = timings.cached_tokens
                self._note_placement()
                self._timeline.prefilled_locally(timings, len(self._order.token_ids))
            await self._relay_rest(decode, batch)

    async def _run_disaggregated(self, reservation: KvReservation) -> None:
        with self._deps.holds.leased(self._decode_id, self._decode_peer, reservation):
            prefill, first = await self._prefill(reservation)
            if first.batch.finish_reason is not None:
                await self._relay.feed(first.batch)
                return
            with self._deps.spans.stage(
                StageName.DECODE, {"baton.worker_id": self._decode_id, "baton.local_prefill": False}
            ):
                decode = self._start_decode(reservation, is_local=False)
                handoff = asyncio.create_task(self._watch_handoff(prefill))
                try:
                    if await self._relay.feed(first.batch):
                        return
                    await self._decode_after_handoff(decode, handoff)
                finally:
                    handoff.cancel()

    async def _prefill(
        self, reservation: KvReservation
    ) -> tuple[AnswerStream[PrefillEvent], FirstToken]:
        """Runs the prompt to its first token; the hand-off may go on after that."""
        live, prefill, peer = self._live, self._placement.prefill, self._prefill_peer
        if prefill is None or peer is None:
            raise Internal("a local placement has no prefill worker")
        attributes = {"baton.worker_id": prefill.worker_id}
        with (
            self._deps.spans.stage(StageName.PREFILL, attributes) as span,
            self._blaming(StageName.PREFILL),
        ):
            target = PushTarget(
                worker_id=self._decode_id,
                address=reservation.push_address,
                reservation_id=reservation.reservation_id,
                epoch=reservation.epoch,
                num_cached_blocks=reservation.num_cached_blocks,
            )
            stream = peer.prefill(self._order, target, live.remaining_s())
            self._may_hold_copy = True
            self._held.callback(self._release_copy)
            self._held.callback(stream.cancel)
            started = await stream.next(self._prefill_bound_s())
            if not isinstance(started, PrefillStarted):
                raise NoWorker("the prefill ended before it started")
            live.state.transition(RequestStatus.PREFILLING, live.clock.now())
            first = await stream.next(self._prefill_bound_s())
            if not isinstance(first, FirstToken):
                raise NoWorker("the prefill ended without a first token")
            span.set_attribute("baton.cached_tokens", started.cached_tokens)
        self._prefilled()
        self._timeline.prefilled(started, first, len(self._order.token_ids))
        live.state.transition(RequestStatus.TRANSFERRING, live.clock.now())
        self._prefill_cached_tokens = started.cached_tokens
        self._note_placement()
        return stream, first

    async def _watch_handoff(self, prefill: AnswerStream[PrefillEvent]) -> BatonError | None:
        """Notes the hand-off's figures; returns its error, or None once the KV is committed."""
        try:
            event = await prefill.next(self._prefill_bound_s())
        except BatonError as error:
            return error
        if not isinstance(event, PrefillDone):
            return NoWorker("the prefill ended before its hand-off")
        self._timeline.handed_off(event)
        await prefill.drain(_LAST_WORD_S)
        return None

    async def _decode_after_handoff(
        self, decode: AnswerStream[TokenBatch], handoff: asyncio.Task[BatonError | None]
    ) -> None:
        live = self._live
        batch = await self._first_batch(decode, handoff)
        live.prompt_kv.computed_at(self._decode_id)
        live.state.transition(RequestStatus.COMMITTED, live.clock.now())
        live.state.transition(RequestStatus.DECODING, live.clock.now())
        self._timeline.first_decoded(batch)
        self._release_copy("decoding")
        if batch.finish_reason is not None:
            # The hand-off's figures belong in the last message, and are on their way.
            await ended_within(live.clock, {handoff}, _LAST_WORD_S)
        await self._relay_rest(decode, batch)

    async def _first_batch(
        self, decode: AnswerStream[TokenBatch], handoff: asyncio.Task[BatonError | None]
    ) -> TokenBatch:
        """The first tokens from D; notices that P was lost before D's silence would show it."""
        bound_s = self._bound_s(self._deps.settings.decode_stall_s)
        reading = asyncio.create_task(self._next_batch(decode, bound_s, handoff))
        try:
            await asyncio.wait({reading, handoff}, return_when=asyncio.FIRST_COMPLETED)
            error = None if reading.done() else await handoff
            if error is None or await ended_within(self._live.clock, {reading}, _COMMIT_GRACE_S):
                return await reading
            raise self._failure(StageName.PREFILL, error)
        finally:
            reading.cancel()

    async def _relay_rest(self, decode: AnswerStream[TokenBatch], batch: TokenBatch) -> None:
        stall_s = self._deps.settings.decode_stall_s
        while not await self._relay.feed(batch):
            batch = await self._next_batch(decode, self._bound_s(stall_s))
        if batch.finish_reason is not None:
            await decode.drain(_LAST_WORD_S)

    async def _next_batch(
        self,
        decode: AnswerStream[TokenBatch],
        bound_s: float,
        handoff: asyncio.Task[BatonError | None] | None = None,
    ) -> TokenBatch:
        with self._blaming(StageName.DECODE, handoff):
            batch = await decode.next(bound_s)
            if batch is None:
                raise NoWorker("the token stream ended without a finish reason")
            if batch.token_ids and batch.token_index > len(self._live.output.ids):
                raise Internal(f"tokens are missing before index {batch.token_index}")
        self._has_tokens = True
        self._timeline.stepped(batch)
        return batch

    def _start_decode(
        self, reservation: KvReservation, *, is_local: bool
    ) -> AnswerStream[TokenBatch]:
        stream = self._decode_peer.decode(
            reservation, local_prefill=is_local, timeout_s=self._live.remaining_s()
        )
        self._held.callback(stream.cancel)
        return stream

    def _release_copy(self, reason: str = "") -> None:
        """Lets the prefill worker give up its copy of the KV; once."""
        peer, order = self._prefill_peer, self._order
        if peer is not None and self._may_hold_copy:
            self._may_hold_copy = False
            why = reason or self._outcome
            self._deps.holds.release_copy(peer, order.request_id, order.attempt, why)

    def _release_blocks(self) -> None:
        peer, request_id = self._decode_peer, self._order.request_id
        reservation_id = self._reservation.reservation_id if self._reservation else ""
        self._deps.holds.release_blocks(peer, request_id, reservation_id, self._outcome)

    def _note_placement(self) -> None:
        placement = self._placement
        fingerprint = placement.decode.status.fingerprint
        block_size = fingerprint.layout.block_size if fingerprint else 0
        num_cached_blocks = self._reservation.num_cached_blocks if self._reservation else 0
        decode_cached = num_cached_blocks * block_size
        self._live.output.found_cached(max(decode_cached, self._prefill_cached_tokens))
        self._live.placement = PlacementTaken(
            prefill_worker_id=(placement.prefill or placement.decode).worker_id,
            decode_worker_id=self._decode_id,
            local_prefill=placement.is_local,
            reason=placement.reason,
            attempts=self._number,
            decode_cached_tokens=decode_cached,
            prefill_cached_tokens=self._prefill_cached_tokens,
        )

    def _bound_s(self, stage_s: float) -> float:
        return min(self._live.remaining_s(), stage_s)

    def _prefill_bound_s(self) -> float:
        compute_s = len(self._order.token_ids) / _SLOWEST_PREFILL_TOKENS_PER_S
        return self._bound_s(self._deps.settings.prefill_stall_s + compute_s)

    @contextmanager
    def _blaming(
        self, step: StageName, handoff: asyncio.Task[BatonError | None] | None = None
    ) -> Iterator[None]:
        """Turns a failed call into what it means for the request; see `core.blame`."""
        try:
            yield
        except BatonError as error:
            lost = handoff.result() if handoff is not None and handoff.done() else None
            is_lost = lost is not None and lost.reason is ErrorReason.NO_WORKER
            raise self._failure(step, error, prefill_lost=lost if is_lost else None) from error

    def _failure(
        self, step: StageName, error: BatonError, *, prefill_lost: BatonError | None = None
    ) -> AttemptFailed | BatonError:
        live, decode = self._live, self._placement.decode
        prefill = self._placement.prefill or decode
        facts = {
            Fact.SILENCE: isinstance(error, Silent),
            Fact.LATE: live.is_late(_DEADLINE_SLACK_S),
            Fact.QUEUED: not self._has_tokens and self._deps.cluster.has_queue(self._decode_id),
            Fact.PREFILL_LOST: prefill_lost is not None,
        }
        said_by = Role.PREFILL if step is StageName.PREFILL else Role.DECODE
        true_facts = {fact for fact, is_true in facts.items() if is_true}
        culprit = blame(Complaint(said_by, error.reason, live.state.status, true_facts))
        if culprit is Culprit.DEADLINE:
            return live.late()
        if culprit is Culprit.CALLER:
            return Stalled(f"the caller reads too slowly: {error.message}")
        if culprit is Culprit.QUEUE:
            error = QueueFull(f"decode worker {self._decode_id} did not get to the request in time")
        elif prefill_lost is not None and culprit is Culprit.PREFILL:
            step, error = StageName.PREFILL, prefill_lost
        if isinstance(error, DeadlineExceeded):
            silent = prefill if step is StageName.PREFILL else decode
            error = Stalled(f"no answer from {silent.worker_id} in time")
        blamed = prefill if culprit is Culprit.PREFILL else decode
        return AttemptFailed(step, blamed.worker_id, error)
