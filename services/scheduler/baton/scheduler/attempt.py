"""One attempt at a request on one placement: reserve, prefill, decode; whatever happens, let go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.core.errors import BatonError, DeadlineExceeded, ErrorReason, Internal, NoWorker, Stalled
from baton.core.output import TokenBatch
from baton.core.placement import Placement
from baton.core.request import Part, RequestStatus, Stage
from baton.scheduler.background import Leases, Releases
from baton.scheduler.failover import AttemptFailed
from baton.scheduler.live import LiveRequest, StageSpans
from baton.scheduler.messages import (
    FirstToken,
    PlacementTaken,
    PrefillDone,
    PrefillEvent,
    PrefillStarted,
    PushTarget,
    Reservation,
)
from baton.scheduler.peers import Peers
from baton.scheduler.relay import FIRST_DECODE_STAGE, OutputRelay
from baton.scheduler.settings import SchedulerSettings
from baton.scheduler.streams import PeerStream, Silent
from baton.scheduler.trail import Trail

_SLOWEST_PREFILL_TOKENS_PER_S = 100.0
_COMMIT_GRACE_S = 1.0
"""After the prefill worker was lost, the KV may have been committed already: D knows soon."""
_LAST_WORD_S = 0.2
_DEADLINE_SLACK_S = 0.05
# Decode says these about a hand-off, whose other end is the prefill worker.
_HANDOFF_FAULTS = frozenset({
    ErrorReason.KV_TRANSFER_LOST,
    ErrorReason.KV_CHECKSUM,
    ErrorReason.KV_LAYOUT_MISMATCH,
})
# Prefill says these about the reservation that it pushes into.
_RESERVATION_FAULTS = frozenset({
    ErrorReason.KV_TRANSFER_LOST,
    ErrorReason.STALE_EPOCH,
    ErrorReason.REQUEST_NOT_FOUND,
})


@dataclass(frozen=True, slots=True)
class AttemptTools:
    """What attempts share."""

    peers: Peers
    releases: Releases
    leases: Leases
    spans: StageSpans
    settings: SchedulerSettings


class Attempt:
    """Runs once. Whatever it holds at its workers is released when `run` is left."""

    def __init__(
        self,
        live: LiveRequest,
        placement: Placement,
        relay: OutputRelay,
        tools: AttemptTools,
        prefilled: Callable[[], None],
    ) -> None:
        self._live = live
        self._placement = placement
        self._relay = relay
        self._tools = tools
        self._prefilled = prefilled
        self._trail = Trail(live, placement)
        self._order = live.order(placement)
        self._decode_peer = tools.peers.decode(placement.decode)
        self._prefill_peer = tools.peers.prefill(placement.prefill) if placement.prefill else None
        self._reservation: Reservation | None = None
        self._may_hold_blocks = False
        self._may_hold_copy = False
        self._streams: list[PeerStream[PrefillEvent] | PeerStream[TokenBatch]] = []
        self._prefill_cached_tokens = 0
        self._first_token_at_s = 0.0

    async def run(self) -> None:
        """Returns when the output has ended.

        Raises:
            AttemptFailed: a worker failed; the request can go on with another attempt.
            BatonError: the request itself failed.
        """
        reason = "failed"
        try:
            reservation = await self._reserve()
            if self._placement.prefill is None:
                await self._run_local(reservation)
            else:
                await self._run_disaggregated(reservation)
            reason = "finished"
        except asyncio.CancelledError:
            reason = "cancelled"
            raise
        finally:
            self._let_go(reason)

    async def _reserve(self) -> Reservation:
        decode = self._placement.decode
        with (
            self._tools.spans.stage("reserve", {"baton.worker_id": decode.worker_id}) as span,
            self._blaming("reserve", decode.worker_id),
        ):
            timeout_s = min(self._live.remaining_s(), self._tools.settings.reserve_timeout_s)
            self._may_hold_blocks = True
            try:
                reservation = await self._decode_peer.reserve(self._order, timeout_s)
            except BatonError as error:
                # After silence or a broken connection nobody knows; any other answer is a refusal.
                self._may_hold_blocks = error.reason in {
                    ErrorReason.NO_WORKER,
                    ErrorReason.DEADLINE,
                }
                raise
            span.set_attribute("baton.num_blocks", reservation.num_blocks)
            span.set_attribute("baton.num_cached_blocks", reservation.num_cached_blocks)
        self._reservation = reservation
        now = self._live.clock()
        self._live.stages.mark("reserve", now, worker_id=decode.worker_id)
        self._live.state.transition(RequestStatus.RESERVED, now)
        self._trail.reserved()
        self._note_placement()
        return reservation

    async def _run_local(self, reservation: Reservation) -> None:
        live, worker_id = self._live, self._placement.decode.worker_id
        with self._tools.spans.stage(
            "decode", {"baton.worker_id": worker_id, "baton.local_prefill": True}
        ):
            decode = self._start_decode(reservation, is_local=True)
            live.state.transition(RequestStatus.DECODING, live.clock())
            batch = await self._next_batch(decode, self._prefill_bound_s())
            self._prefilled()
            live.prompt_computed(worker_id)
            if timings := batch.timings:
                self._prefill_cached_tokens = timings.cached_tokens
                self._note_placement()
                num_tokens = len(self._order.token_ids)
                parts = [
                    Part("queue", timings.wait_for_kv_s + timings.queue_s),
                    Part("prefill", timings.first_step_s, num_tokens),
                ]
                live.stages.split(parts, "relay", live.clock(), worker_id=worker_id)
            await self._relay_rest(decode, batch)

    async def _run_disaggregated(self, reservation: Reservation) -> None:
        decode_id = self._placement.decode.worker_id
        with self._tools.leases.kept(decode_id, self._decode_peer, reservation):
            prefill, first = await self._prefill(reservation)
            batch = TokenBatch(
                token_index=self._order.num_output_tokens,
                token_ids=(first.token_id,),
                logprobs=(first.logprob,) if first.logprob else (),
                finish_reason=first.finish_reason,
                stop_token_id=first.stop_token_id,
                prompt_logprobs=first.prompt_logprobs,
            )
            if first.finish_reason is not None:
                await self._relay.feed(batch)
                return
            with self._tools.spans.stage(
                "decode", {"baton.worker_id": decode_id, "baton.local_prefill": False}
            ):
                decode = self._start_decode(reservation, is_local=False)
                handoff = asyncio.create_task(self._watch_handoff(prefill))
                try:
                    if await self._relay.feed(batch):
                        return
                    await self._decode_after_handoff(decode, handoff)
                finally:
                    handoff.cancel()

    async def _prefill(
        self, reservation: Reservation
    ) -> tuple[PeerStream[PrefillEvent], FirstToken]:
        """Runs the prompt to its first token; the hand-off may go on after that."""
        live, prefill, peer = self._live, self._placement.prefill, self._prefill_peer
        if prefill is None or peer is None:
            raise Internal("a local placement has no prefill worker")
        with (
            self._tools.spans.stage("prefill", {"baton.worker_id": prefill.worker_id}) as span,
            self._blaming("prefill", prefill.worker_id),
        ):
            target = PushTarget(self._placement.decode.worker_id, reservation)
            stream = peer.prefill(self._order, target, live.remaining_s())
            self._streams.append(stream)
            self._may_hold_copy = True
            started = await stream.next(self._prefill_bound_s())
            if not isinstance(started, PrefillStarted):
                raise NoWorker("the prefill ended before it started")
            live.state.transition(RequestStatus.PREFILLING, live.clock())
            event = await stream.next(self._prefill_bound_s())
            if not isinstance(event, FirstToken):
                raise NoWorker("the prefill ended without a first token")
            span.set_attribute("baton.cached_tokens", started.cached_tokens)
        self._prefilled()
        self._first_token_at_s = live.clock()
        num_tokens = len(self._order.token_ids)
        parts = [
            Part("queue", started.queue_s),
            Part("prefill", event.compute_s, num_tokens - started.cached_tokens),
        ]
        live.stages.split(parts, "relay", self._first_token_at_s, worker_id=prefill.worker_id)
        self._trail.prefilled(started, event)
        live.state.transition(RequestStatus.TRANSFERRING, self._first_token_at_s)
        self._prefill_cached_tokens = started.cached_tokens
        self._note_placement()
        return stream, event

    async def _watch_handoff(self, prefill: PeerStream[PrefillEvent]) -> BatonError | None:
        """Notes the hand-off's figures; returns what went wrong, if anything did."""
        try:
            event = await prefill.next(self._prefill_bound_s())
        except BatonError as error:
            return error
        if not isinstance(event, PrefillDone):
            return NoWorker("the prefill ended before its hand-off")
        live = self._live
        end_s = live.stages.since_arrival(self._first_token_at_s) + event.exposed_s
        live.stages.add(
            Stage(
                "handoff",
                start_s=max(0.0, end_s - event.transfer_s),
                duration_s=event.transfer_s,
                before_first_token=False,
                worker_id=self._placement.decode.worker_id,
                num_bytes=event.num_bytes,
                idle_s=event.idle_s,
            )
        )
        await prefill.drain(_LAST_WORD_S)
        return None

    async def _decode_after_handoff(
        self, decode: PeerStream[TokenBatch], handoff: asyncio.Task[BatonError | None]
    ) -> None:
        live = self._live
        batch = await self._first_batch(decode, handoff)
        live.prompt_computed(self._placement.decode.worker_id)
        now = live.clock()
        live.state.transition(RequestStatus.COMMITTED, now)
        live.state.transition(RequestStatus.DECODING, now)
        if timings := batch.timings:
            spent_s = timings.queue_s + timings.first_step_s
            live.stages.add(
                Stage(
                    FIRST_DECODE_STAGE,
                    start_s=max(0.0, live.stages.since_arrival(now) - spent_s),
                    duration_s=spent_s,
                    before_first_token=False,
                    worker_id=self._placement.decode.worker_id,
                    num_tokens=len(batch.token_ids),
                )
            )
        self._release_copy("decoding")
        if batch.finish_reason is not None:
            # The hand-off's figures belong in the last message, and are on their way.
            await asyncio.wait({handoff}, timeout=_LAST_WORD_S)
        await self._relay_rest(decode, batch)

    async def _first_batch(
        self, decode: PeerStream[TokenBatch], handoff: asyncio.Task[BatonError | None]
    ) -> TokenBatch:
        """The first tokens from D; sooner than its silence would tell, that P was lost."""
        bound_s = self._bound(self._tools.settings.decode_stall_s)
        reading = asyncio.create_task(self._next_batch(decode, bound_s))
        try:
            await asyncio.wait({reading, handoff}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and (error := await handoff) is not None:
                await asyncio.wait({reading}, timeout=_COMMIT_GRACE_S)
                if not reading.done():
                    raise self._prefill_failure(error)
            return await reading
        except AttemptFailed as failure:
            # D only knows that the push broke; whether P is gone, P's own call says.
            error = handoff.result() if handoff.done() else None
            if error is not None and error.reason is ErrorReason.NO_WORKER:
                raise self._prefill_failure(error) from failure
            raise
        finally:
            reading.cancel()

    async def _relay_rest(self, decode: PeerStream[TokenBatch], batch: TokenBatch) -> None:
        bound_s = self._tools.settings.decode_stall_s
        while not await self._relay.feed(batch):
            batch = await self._next_batch(decode, self._bound(bound_s))
        if batch.finish_reason is not None:
            await decode.drain(_LAST_WORD_S)

    async def _next_batch(self, decode: PeerStream[TokenBatch], bound_s: float) -> TokenBatch:
        worker_id = self._placement.decode.worker_id
        with self._blaming("decode", worker_id):
            batch = await decode.next(bound_s)
            if batch is None:
                raise NoWorker("the token stream ended without a finish reason")
            if batch.token_ids and batch.token_index > len(self._live.output_ids):
                raise Internal(f"tokens are missing before index {batch.token_index}")
            self._trail.stepped(batch)
            return batch

    def _start_decode(self, reservation: Reservation, *, is_local: bool) -> PeerStream[TokenBatch]:
        stream = self._decode_peer.decode(
            reservation, is_local=is_local, timeout_s=self._live.remaining_s()
        )
        self._streams.append(stream)
        return stream

    def _note_placement(self) -> None:
        placement = self._placement
        fingerprint = placement.decode.status.fingerprint
        block_size = fingerprint.layout.block_size if fingerprint else 0
        num_cached_blocks = self._reservation.num_cached_blocks if self._reservation else 0
        decode_cached = num_cached_blocks * block_size
        self._relay.found_cached(max(decode_cached, self._prefill_cached_tokens))
        self._live.placement = PlacementTaken(
            prefill_worker_id=(placement.prefill or placement.decode).worker_id,
            decode_worker_id=placement.decode.worker_id,
            is_local=placement.is_local,
            reason=placement.reason,
            attempts=self._live.attempts,
            decode_cached_tokens=decode_cached,
            prefill_cached_tokens=self._prefill_cached_tokens,
        )

    def _bound(self, stage_s: float) -> float:
        return min(self._live.remaining_s(), stage_s)

    def _prefill_bound_s(self) -> float:
        compute_s = len(self._order.token_ids) / _SLOWEST_PREFILL_TOKENS_PER_S
        return self._bound(self._tools.settings.prefill_stall_s + compute_s)

    @contextmanager
    def _blaming(self, stage: str, worker_id: str) -> Iterator[None]:
        """Lays a failed call to the worker whose fault it is, unless the request's time is over."""
        try:
            yield
        except BatonError as error:
            is_silence = isinstance(error, DeadlineExceeded | Stalled)
            if is_silence and self._live.clock() >= self._live.deadline_s - _DEADLINE_SLACK_S:
                raise self._live.late() from error
            if stage == "decode" and self._is_reader_fault(error):
                raise Stalled(f"the caller reads too slowly: {error.message}") from error
            if isinstance(error, DeadlineExceeded):
                error = Stalled(f"no answer from {worker_id} in time")
            if stage == "prefill":
                raise self._prefill_failure(error) from error
            if stage == "decode" and self._is_push_fault(error) and self._placement.prefill:
                worker_id = self._placement.prefill.worker_id
            raise AttemptFailed(stage, worker_id, error) from error

    def _is_reader_fault(self, error: BatonError) -> bool:
        """True when D reports that its tokens are not read: another D would fare no better."""
        is_decoding = self._live.state.status is RequestStatus.DECODING
        return is_decoding and isinstance(error, Stalled) and not isinstance(error, Silent)

    def _is_push_fault(self, error: BatonError) -> bool:
        """True when D reports that the push went wrong, or that it has stopped."""
        is_waiting = self._live.state.status is RequestStatus.TRANSFERRING
        is_push_silent = isinstance(error, Stalled) and not isinstance(error, Silent)
        return error.reason in _HANDOFF_FAULTS or (is_waiting and is_push_silent)

    def _prefill_failure(self, error: BatonError) -> AttemptFailed:
        prefill, decode = self._placement.prefill, self._placement.decode
        is_reservation_fault = error.reason in _RESERVATION_FAULTS or prefill is None
        worker_id = (
            decode.worker_id if is_reservation_fault or prefill is None else prefill.worker_id
        )
        return AttemptFailed("prefill", worker_id, error)

    def _release_copy(self, reason: str) -> None:
        if self._prefill_peer is not None and self._may_hold_copy:
            self._may_hold_copy = False
            self._tools.releases.prefill(
                self._prefill_peer, self._order.request_id, self._order.attempt, reason
            )

    def _let_go(self, reason: str) -> None:
        """Never waits, so that nothing can interrupt it."""
        for stream in self._streams:
            stream.cancel()
        self._release_copy(reason)
        if self._may_hold_blocks:
            reservation_id = self._reservation.reservation_id if self._reservation else ""
            self._tools.releases.decode(
                self._decode_peer, self._order.request_id, reservation_id, reason
            )
