"""Reserved and running requests of a decode worker: the one owner of their reservations.

Every path ends in `release`, which is idempotent. Everything here runs on the event loop; the
engine computes on its own thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from baton.core.clock import Clock
from baton.core.errors import (
    BatonError,
    Cancelled,
    Internal,
    InvalidRequest,
    StaleEpoch,
    Stalled,
    error_for,
)
from baton.core.handoff.frames import KvEncoding, Manifest
from baton.core.handoff.reservation import Reservation, ReservationState, ReservationTable
from baton.core.handoff.verification import Expected
from baton.core.hashing import tokens_hash
from baton.core.ids import make_id
from baton.core.output import DecodeTimings, TokenBatch
from baton.core.sequence import SequenceSpec
from baton.core.timeline import Slice, Slices
from baton.decode.outbox import Outbox
from baton.engine.events import (
    BlocksReady,
    EngineEvent,
    Failed,
    Grant,
    LayersReady,
    Started,
    Tokens,
)
from baton.engine.worker import EngineWorker
from baton.worker.tokens import merge

logger = logging.getLogger(__name__)
_MAX_REMEMBERED = 1024


@dataclass(slots=True)
class Session:
    """One reservation and its history. Times are `Clock.now()` seconds."""

    reservation: Reservation
    spec: SequenceSpec
    grant: Grant
    outbox: Outbox = field(default_factory=Outbox)
    has_kv: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the hand-off is committed, or when the session ends without that."""
    error: BatonError | None = None
    is_push_open: bool = False
    """A push may still be writing: blocks let go now are quarantined."""
    on_release: Callable[[], None] | None = None
    """Wakes the push that waits for its next frame."""
    reserved_at_s: float = 0.0
    kv_chunks: Slices = field(default_factory=Slices)
    """Chunks that arrived, relative to `reserved_at_s`."""
    progressed_at_s: float = 0.0
    """Last sign of life of an open push."""
    arrived_at_s: float = 0.0
    """Of the Decode call."""
    committed_at_s: float = 0.0
    started_at_s: float = 0.0
    num_cached_tokens: int = 0
    first_token_at_s: float = 0.0
    output_ids: list[int] = field(default_factory=list)
    """Output tokens of this attempt that were read, P's first one included."""
    num_tokens: int = 0
    """Tokens computed here and read, without P's first one."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    is_finished: bool = False
    """The last token was read."""

    @property
    def seq_id(self) -> str:
        """The engine's name for it."""
        return self.reservation.seq_id

    def timings(self, now: float) -> DecodeTimings:
        """Where the time went until the first token computed here, at `now`."""
        computable_at_s = self.committed_at_s or self.arrived_at_s
        started_at_s = max(self.started_at_s, computable_at_s)
        return DecodeTimings(
            wait_for_kv_s=max(0.0, self.committed_at_s - self.arrived_at_s),
            queue_s=started_at_s - computable_at_s,
            first_step_s=max(0.0, now - started_at_s),
            cached_tokens=self.num_cached_tokens,
            kv_chunks=tuple(self.kv_chunks),
        )


class Sessions:
    """All sessions of the worker."""

    def __init__(
        self,
        worker: EngineWorker,
        *,
        lease_s: float,
        progress_timeout_s: float,
        rng: Random,
        clock: Clock,
        on_end: Callable[[Session, str], None],
        encodings: frozenset[KvEncoding] = frozenset(KvEncoding),
    ) -> None:
        """`on_end` gets a session and how it ended: "finished", or an error's reason."""
        self._worker = worker
        self._engine = worker.engine
        self._table = ReservationTable(lease_s)
        self._progress_timeout_s = progress_timeout_s
        self._rng = rng
        self._clock = clock
        self._on_end = on_end
        self._encodings = encodings
        self._by_id: dict[str, Session] = {}
        self._ended: OrderedDict[str, BatonError] = OrderedDict()
        """Why the latest sessions ended, by reservation: late calls get the reason."""
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.num_leases_expired = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def lease_s(self) -> float:
        """Length of a lease."""
        return self._table.lease_s

    async def wait_idle(self) -> None:
        """Returns once there is no session."""
        await self._is_idle.wait()

    def reserve(
        self, spec: SequenceSpec, request_id: str, attempt: int, *, fork_of: str = ""
    ) -> Session:
        """Room for an attempt; earlier attempts of the request end.

        `fork_of` is the id of a request whose prompt's KV may be shared.

        Raises:
            StaleEpoch: this attempt or a later one is here already.
            KvCacheFull, QueueFull, PromptTooLong: there is no room (ever, or now).
        """
        for older in self._table.older(request_id, attempt):
            self.release(
                self._by_id[older.reservation_id], StaleEpoch(f"attempt {attempt} replaced it")
            )
        origins = self._table.of_request(fork_of) if fork_of else []
        grant = self._engine.sequences.reserve(spec, origins[-1].seq_id if origins else "")
        reservation = self._table.open(
            make_id("res", self._rng), request_id, attempt, self._clock.now()
        )
        session = Session(reservation, spec, grant, reserved_at_s=self._clock.now())
        self._by_id[reservation.reservation_id] = session
        self._is_idle.clear()
        self._worker.subscribe(spec.seq_id, lambda event: self._on_event(session, event))
        return session

    def find(self, reservation_id: str, epoch: int) -> Session:
        """The live session of a reservation, for a push.

        Raises:
            RequestNotFound: there never was one.
            StaleEpoch: it has ended, or has another epoch.
        """
        ended = self._ended.get(reservation_id)
        if ended is not None:
            raise StaleEpoch(f"the reservation ended: {ended.message}")
        return self._by_id[self._table.find(reservation_id, epoch).reservation_id]

    def attach(self, reservation_id: str, epoch: int) -> Session:
        """The session for a Decode call, its only reader; the lease cannot end meanwhile.

        Raises:
            RequestNotFound, StaleEpoch: as `find`.
            InvalidRequest: another call reads it.
            BatonError: what it ended with, if it has.
        """
        ended = self._ended.get(reservation_id)
        if ended is not None:
            raise error_for(ended.reason, ended.message)
        session = self.find(reservation_id, epoch)
        if session.reservation.is_attached:
            raise InvalidRequest("the reservation's tokens are being read by another call")
        session.reservation.is_attached = True
        session.arrived_at_s = self._clock.now()
        return session

    def expected(self, session: Session) -> Expected:
        """What a push into the session must bring."""
        token_ids = session.spec.token_ids
        fingerprint = self._engine.fingerprint
        return Expected(
            fingerprint=fingerprint,
            block_start=session.grant.num_cached_blocks,
            block_end=-(-len(token_ids) // fingerprint.layout.block_size),
            num_tokens=len(token_ids),
            tokens_hash=tokens_hash(token_ids),
            encodings=self._encodings,
        )

    def push_opened(self, session: Session) -> None:
        """From now on a push may write to the session's blocks."""
        session.is_push_open = True
        self.push_progressed(session)
        self._engine.sequences.begin_fill(session.seq_id)

    def push_progressed(self, session: Session) -> None:
        """Notes a sign of life of the push."""
        session.progressed_at_s = self._clock.now()
        self._table.touch(session.reservation, session.progressed_at_s)

    def chunk_arrived(self, session: Session, since_s: float, num_bytes: int) -> None:
        """A chunk, received at `since_s`, is verified and written."""
        begin_s, end_s = since_s - session.reserved_at_s, self._clock.now() - session.reserved_at_s
        session.kv_chunks.add(Slice(begin_s, end_s, num_bytes=num_bytes))

    def push_ended(self, session: Session, error: BatonError) -> None:
        """No more frames come. Ends the session with `error` unless it was committed."""
        if session.reservation.state is ReservationState.FILLING:
            self.release(session, error)

    def writes_ended(self, session: Session) -> None:
        """All writes have ended: blocks let go meanwhile may be used again."""
        session.is_push_open = False
        if session.reservation.state is ReservationState.RELEASED:
            self._engine.sequences.end_quarantine(session.seq_id)

    def commit(self, session: Session, manifest: Manifest) -> None:
        """All KV is here, verified: the sequence joins the running batch.

        Raises:
            BatonError: the engine takes no such sequence; nothing has changed.
        """
        self._engine.sequences.commit(session.seq_id, manifest.first_token_id)
        session.reservation.transition(ReservationState.COMMITTED)
        session.committed_at_s = self._clock.now()
        self._table.touch(session.reservation, session.committed_at_s)
        session.output_ids.append(manifest.first_token_id)
        session.has_kv.set()

    async def stream(
        self, session: Session, *, local_prefill: bool
    ) -> AsyncGenerator[TokenBatch, None]:
        """Tokens of an attached session; the caller releases it afterwards, however this ends.

        Waits for the hand-off's commit first, or has the prompt computed here. How long to wait
        for a push to begin is the caller's decision: the prompt may be queued at the sender.

        Raises:
            InvalidRequest: a local prefill comes after a push.
            Stalled: the push, or this reader, makes no progress.
            BatonError: whatever ended the session.
        """
        reservation = session.reservation
        if local_prefill:
            if reservation.state is not ReservationState.RESERVED:
                raise InvalidRequest(
                    f"local_prefill needs a fresh reservation, this one is "
                    f"{reservation.state.value}"
                )
            self._engine.sequences.start_local(session.seq_id)
        else:
            await self._wait_for_kv(session)
        reservation.transition(ReservationState.RUNNING)
        while True:
            events = await self._take(session)
            timings = None
            if not session.first_token_at_s:
                session.first_token_at_s = events[0].at_s
                timings = session.timings(events[0].at_s)
            batch = merge(events, timings)
            session.output_ids.extend(batch.token_ids)
            session.num_tokens += len(batch.token_ids)
            session.num_draft_tokens += batch.draft_tokens
            session.num_accepted_tokens += batch.accepted_tokens
            session.is_finished = batch.finish_reason is not None
            yield batch
            if session.is_finished:
                return

    def renew(self, reservation_ids: Iterable[str]) -> list[str]:
        """Renews leases; returns the ids that are not known."""
        return self._table.renew(reservation_ids, self._clock.now())

    def release(self, session: Session, error: BatonError) -> int:
        """Ends a session: fences it, then lets its blocks go. Returns how many.

        Its reader and its push get `error`.
        """
        if not self._table.release(session.reservation):
            return 0
        del self._by_id[session.reservation.reservation_id]
        self._ended[session.reservation.reservation_id] = error
        if len(self._ended) > _MAX_REMEMBERED:
            self._ended.popitem(last=False)
        session.error = error
        session.has_kv.set()
        session.outbox.fail(error)
        if session.on_release is not None:
            session.on_release()
        self._worker.unsubscribe(session.seq_id)
        num_blocks = self._engine.sequences.release(session.seq_id, quarantine=session.is_push_open)
        self._on_end(session, "finished" if session.is_finished else error.reason.name.lower())
        if not self._by_id:
            self._is_idle.set()
        return num_blocks

    def release_named(self, reservation_id: str, request_id: str, reason: str) -> int:
        """Ends one reservation, or all of a request; 0 when there is none."""
        if reservation_id:
            found = [self._table.get(reservation_id)]
        else:
            found = [*self._table.of_request(request_id)]
        return sum(
            self.release(self._by_id[item.reservation_id], Cancelled(f"released: {reason}"))
            for item in found
            if item is not None
        )

    def end_all(self, error: BatonError) -> None:
        """Ends every session."""
        for session in list(self._by_id.values()):
            self.release(session, error)

    def sweep_once(self, now: float) -> None:
        """Ends sessions whose lease has ended by `now`."""
        for reservation in self._table.expired(now):
            self.num_leases_expired += 1
            logger.warning(
                "lease expired",
                extra={
                    "reservation_id": reservation.reservation_id,
                    "request_id": reservation.request_id,
                    "state": reservation.state.value,
                },
            )
            self.release(
                self._by_id[reservation.reservation_id], StaleEpoch("the reservation's lease ended")
            )

    async def _wait_for_kv(self, session: Session) -> None:
        while not session.has_kv.is_set():
            try:
                async with self._clock.timeout(self._progress_timeout_s):
                    await session.has_kv.wait()
            except TimeoutError:
                silent_s = self._clock.now() - session.progressed_at_s
                # Twice the push's own limit, which says why it ended and should come first.
                if session.is_push_open and silent_s >= 2 * self._progress_timeout_s:
                    raise Stalled(f"the push brought nothing for {silent_s:.1f} s") from None
        if session.error is not None:
            raise session.error

    async def _take(self, session: Session) -> list[Tokens]:
        while True:
            try:
                async with self._clock.timeout(self._progress_timeout_s):
                    return await session.outbox.take()
            except TimeoutError:
                if not self._worker.is_alive:
                    raise Internal("the engine has stopped") from None

    def _on_event(self, session: Session, event: EngineEvent) -> None:
        try:
            match event:
                case Tokens():
                    session.outbox.put(event)
                case Started():
                    session.started_at_s = event.at_s
                    session.num_cached_tokens = event.num_cached_tokens
                case Failed():
                    self.release(session, event.error)
                case LayersReady() | BlocksReady():
                    pass
        except Stalled as error:
            self.release(session, error)
