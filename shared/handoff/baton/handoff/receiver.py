"""Receives pushes: verifies every chunk, writes it, and commits when all of it is there.

The rules are those of `baton.core.handoff`. What is added here: credits, time limits, threads that
copy, hash and write, and that blocks stay quarantined until the last of those threads is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

import xxhash

from baton.core.clock import Clock, TimeLimit
from baton.core.errors import (
    BatonError,
    InvalidRequest,
    KvTransferLost,
    RequestNotFound,
    StaleEpoch,
    Stalled,
)
from baton.core.handoff.frames import (
    ChunkFrame,
    Committed,
    Credit,
    KvChunk,
    KvEncoding,
    Manifest,
    Opening,
    PushAnswer,
    PushFrame,
)
from baton.core.handoff.reservation import Reservation
from baton.core.handoff.verification import Expected, Receiver
from baton.handoff.kv_store import KvStore
from baton.handoff.transports.registry import ReceiverTransports
from baton.handoff.transports.transport import Inlet

_NUM_WRITERS = 2


class PushSession(Protocol):
    """A reservation that a push may fill."""

    reservation: Reservation
    error: BatonError | None
    """Why it was released, once it was."""
    on_release: Callable[[], None] | None
    """Wakes the push that waits for its next frame."""
    progressed_at_s: float
    """Last sign of life of the push."""

    @property
    def seq_id(self) -> str:
        """Name of its sequence in the store."""
        ...


SessionT = TypeVar("SessionT", bound=PushSession)


class PushSessions(Protocol[SessionT]):
    """The owner of all reservations of a worker."""

    def find(self, reservation_id: str, epoch: int) -> SessionT:
        """The live session of a reservation.

        Raises:
            RequestNotFound: there never was one.
            StaleEpoch: it has ended, or has another epoch.
        """
        ...

    def expected(self, session: SessionT) -> Expected:
        """What a push into the session must bring."""
        ...

    def push_opened(self, session: SessionT) -> None:
        """From now on the push may write to the session's blocks."""
        ...

    def push_progressed(self, session: SessionT) -> None:
        """The push gave a sign of life."""
        ...

    def chunk_arrived(self, session: SessionT, since_s: float, num_bytes: int) -> None:
        """A chunk, received at `since_s`, is verified and written."""
        ...

    def commit(self, session: SessionT, manifest: Manifest) -> None:
        """All KV is here, verified.

        Raises:
            BatonError: the engine takes no such sequence; nothing has changed.
        """
        ...

    def push_ended(self, session: SessionT, error: BatonError) -> None:
        """No more frames come. Ends the session with `error` unless it was committed."""
        ...

    def writes_ended(self, session: SessionT) -> None:
        """No thread writes for the push any longer."""
        ...


class Intake(Generic[SessionT]):
    """All pushes into this worker."""

    def __init__(
        self,
        store: KvStore,
        sessions: PushSessions[SessionT],
        transports: ReceiverTransports,
        *,
        num_credits: int,
        progress_timeout_s: float,
        clock: Clock,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._transports = transports
        self._num_credits = num_credits
        self._progress_timeout_s = progress_timeout_s
        self._clock = clock
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="baton-intake")
        self.num_bytes = 0
        """Payload bytes written."""
        self.has_rounded_kv = False
        """A push brought rounded KV: blocks may differ from what their hashes promise."""

    def close(self) -> None:
        """Waits for the writing threads."""
        self._writers.shutdown()
        self._transports.close()

    async def receive(self, frames: AsyncIterator[PushFrame]) -> AsyncGenerator[PushAnswer, None]:
        """Serves one push to its end.

        Raises:
            RequestNotFound, StaleEpoch: the reservation has ended, or never existed.
            KvLayoutMismatch, KvChecksum: what came is not what belongs here.
            KvTransferLost: the sender stopped before its manifest.
            Stalled: nothing came for too long.
        """
        opening = await self._next(frames)
        if not isinstance(opening, Opening):
            raise KvTransferLost("the first frame of a push must open it")
        session = self._sessions.find(opening.reservation_id, opening.epoch)
        expected = self._sessions.expected(session)
        receiver = Receiver(session.reservation, expected, xxhash.xxh3_64_intdigest)
        receiver.open(opening)
        self.has_rounded_kv |= receiver.encoding is KvEncoding.INT8
        push = _IncomingPush(self, self._sessions, session, receiver)
        num_credits = self._num_credits
        try:
            self._sessions.push_opened(session)
            push.inlet = inlet = await self._transports.open(opening, num_credits)
            self._sessions.push_progressed(session)
            if inlet.offer is not None:
                num_credits = min(num_credits, inlet.offer.num_slots)
                yield inlet.offer
            yield Credit(num_credits)
            while True:
                frame = await self._next(frames, session)
                self._sessions.push_progressed(session)
                if isinstance(frame, ChunkFrame):
                    received_at_s = session.progressed_at_s
                    await push.write(frame)
                    self._sessions.chunk_arrived(
                        session, received_at_s, frame.payload.nbytes or frame.slot_bytes
                    )
                    yield Credit(1)
                elif isinstance(frame, Manifest):
                    receiver.manifest(frame)
                    self._sessions.commit(session, frame)
                    push.is_committed = True
                    break
                elif isinstance(frame, Opening):
                    raise KvTransferLost("a push can be opened only once")
        except BatonError as error:
            push.close(error)
            raise
        finally:
            push.close(KvTransferLost(f"the push from {opening.worker_id} ended early"))
        yield Committed(receiver.received.num_bytes, receiver.received.num_chunks)

    async def _next(
        self, frames: AsyncIterator[PushFrame], session: SessionT | None = None
    ) -> PushFrame:
        """The next frame. A session that is or gets released ends the waiting at once."""
        if session is not None and session.error is not None:
            raise _ended(session.error)
        try:
            async with self._clock.timeout(self._progress_timeout_s) as limit:
                if session is not None:
                    session.on_release = lambda: _end(limit)
                return await anext(frames)
        except StopAsyncIteration:
            raise KvTransferLost("the push ended before its manifest") from None
        except TimeoutError:
            if session is not None and session.error is not None:
                raise _ended(session.error) from None
            raise Stalled(f"the push brought nothing for {self._progress_timeout_s:g} s") from None
        finally:
            if session is not None:
                session.on_release = None

    def start_write(
        self,
        session: SessionT,
        receiver: Receiver,
        chunk: KvChunk,
        content: Callable[[], memoryview],
    ) -> asyncio.Future[None]:
        """Starts copying, verifying and writing a checked chunk on a thread, in this order."""

        def write() -> None:
            payload = content()
            receiver.verify(chunk, payload)
            self._store.write(session.seq_id, chunk.span, receiver.encoding, payload)

        return asyncio.get_running_loop().run_in_executor(self._writers, write)


class _IncomingPush(Generic[SessionT]):
    """One push, and its write under way."""

    def __init__(
        self,
        intake: Intake[SessionT],
        sessions: PushSessions[SessionT],
        session: SessionT,
        receiver: Receiver,
    ) -> None:
        self._intake = intake
        self._sessions = sessions
        self._session = session
        self._receiver = receiver
        self.inlet: Inlet | None = None
        """How its chunks come, once that is agreed on."""
        self.is_committed = False
        self._writing: asyncio.Future[None] | None = None
        self._is_closed = False

    async def write(self, frame: ChunkFrame) -> None:
        """Verifies and writes a chunk. When this is cancelled the write goes on: see `close`."""
        chunk, num_bytes = frame.chunk, frame.payload.nbytes

        def content() -> memoryview:
            return frame.payload

        if frame.slot_bytes and self.inlet is not None:
            num_bytes = frame.slot_bytes
            content = await self.inlet.take(chunk.sequence, num_bytes)
        self._receiver.check(chunk, num_bytes)
        self._writing = self._intake.start_write(self._session, self._receiver, chunk, content)
        try:
            await asyncio.shield(self._writing)
        except (RequestNotFound, InvalidRequest) as error:
            # The session was released after the check above: its blocks were out of reach.
            raise _ended(error) from error
        self._writing = None
        self._receiver.accept(chunk)
        self._intake.num_bytes += num_bytes

    def close(self, error: BatonError) -> None:
        """Fences the push at once, and ends its quarantine when its write is done.

        Only the first call counts.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self.inlet is not None:
            self.inlet.close(is_committed=self.is_committed)
        self._sessions.push_ended(self._session, error)
        if self._writing is None or self._writing.done():
            self._sessions.writes_ended(self._session)
        else:
            self._writing.add_done_callback(self._after_write)

    def _after_write(self, done: asyncio.Future[None]) -> None:
        if not done.cancelled():
            done.exception()  # seen here, else asyncio logs it
        self._sessions.writes_ended(self._session)


def _end(limit: TimeLimit) -> None:
    """Ends a wait now, unless its time has just run out: that cannot be changed."""
    if not limit.expired():
        limit.reschedule(0.0)


def _ended(error: BatonError) -> BatonError:
    """The error that the sender gets; Stalled if the Decode call noticed the silence first."""
    return (
        error
        if isinstance(error, Stalled)
        else StaleEpoch(f"the reservation ended: {error.message}")
    )
