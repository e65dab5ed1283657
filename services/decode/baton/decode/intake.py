"""Receives pushes: verifies every chunk, writes it, and commits when all of it is there.

The rules are those of `baton.core.handoff`. What is added here: credits, time limits, threads that
write, and that blocks stay quarantined until the last of those threads is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import xxhash

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
    KvEncoding,
    Manifest,
    Opening,
    PushAnswer,
    PushFrame,
    Span,
)
from baton.core.handoff.verification import Receiver
from baton.decode.regions import Region, Regions
from baton.decode.sessions import Session, Sessions
from baton.engine.kv_rounding import restore_kv
from baton.engine.worker import EngineWorker

_NUM_WRITERS = 2


class Intake:
    """All pushes into this worker."""

    def __init__(
        self,
        worker: EngineWorker,
        sessions: Sessions,
        regions: Regions,
        *,
        num_credits: int,
        progress_timeout_s: float,
    ) -> None:
        self._engine = worker.engine
        self._sessions = sessions
        self._regions = regions
        self._num_credits = num_credits
        self._progress_timeout_s = progress_timeout_s
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="baton-intake")
        self.num_bytes = 0
        """Payload bytes written."""
        self.has_rounded_kv = False
        """KV here, or what was computed from it, may not be what its block hashes promise."""

    def close(self) -> None:
        """Waits for the writing threads."""
        self._writers.shutdown()
        self._regions.stop()

    async def receive(self, frames: AsyncIterator[PushFrame]) -> AsyncGenerator[PushAnswer, None]:
        """Serves one push to its end.

        Raises:
            RequestNotFound, StaleEpoch: the reservation is gone, or was never this sender's.
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
        push = _Push(self, self._sessions, session, receiver)
        num_credits = self._num_credits
        try:
            self._sessions.push_opened(session)
            region = await self._regions.open(opening, num_credits)
            self._sessions.push_progressed(session)
            if region is not None:
                push.region = region
                num_credits = min(num_credits, region.offer.num_slots)
                yield region.offer
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
                    if region is not None:
                        region.is_settled = True
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
        self, frames: AsyncIterator[PushFrame], session: Session | None = None
    ) -> PushFrame:
        """The next frame. A session that is or gets released ends the waiting at once."""
        if session is not None and session.error is not None:
            raise _ended(session.error)
        try:
            async with asyncio.timeout(self._progress_timeout_s) as limit:
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
        self, session: Session, span: Span, payload: memoryview, encoding: KvEncoding
    ) -> asyncio.Future[None]:
        """Starts writing a verified chunk on a thread."""
        self.num_bytes += payload.nbytes
        return asyncio.get_running_loop().run_in_executor(
            self._writers, self._write, session.seq_id, span, payload, encoding
        )

    def _write(self, seq_id: str, span: Span, payload: memoryview, encoding: KvEncoding) -> None:
        layout = self._engine.fingerprint.layout
        if encoding.layout(layout) != layout:
            payload = restore_kv(payload, layout, span)
        self._engine.transfer.write_blocks(
            seq_id,
            span.block_start,
            span.num_blocks,
            span.layer_start,
            span.layer_end,
            payload,
        )


class _Push:
    """One push, and its write under way."""

    def __init__(
        self, intake: Intake, sessions: Sessions, session: Session, receiver: Receiver
    ) -> None:
        self._intake = intake
        self._sessions = sessions
        self._session = session
        self._receiver = receiver
        self.region: Region | None = None
        """Where its chunks lie, if not in their frames."""
        self._writing: asyncio.Future[None] | None = None
        self._is_closed = False

    async def write(self, frame: ChunkFrame) -> None:
        """Verifies and writes a chunk. When this is cancelled the write goes on: see `close`."""
        payload = await self._taken(frame) if frame.slot_bytes else frame.payload
        self._receiver.chunk(frame.chunk, payload)
        self._writing = self._intake.start_write(
            self._session, frame.chunk.span, payload, self._receiver.encoding
        )
        try:
            await asyncio.shield(self._writing)
        except (RequestNotFound, InvalidRequest) as error:
            # The session was released after the check above: its blocks were out of reach.
            raise _ended(error) from error
        self._writing = None

    def close(self, error: BatonError) -> None:
        """Fences the push at once, and ends its quarantine when its write is done.

        Only the first call counts.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self.region is not None:
            self.region.close()
        self._sessions.push_ended(self._session, error)
        if self._writing is None or self._writing.done():
            self._sessions.writes_ended(self._session)
        else:
            self._writing.add_done_callback(self._after_write)

    async def _taken(self, frame: ChunkFrame) -> memoryview:
        if self.region is None:
            raise KvTransferLost("a chunk came in a slot, and none were offered")
        return await self.region.take(frame.chunk.sequence, frame.slot_bytes)

    def _after_write(self, done: asyncio.Future[None]) -> None:
        if not done.cancelled():
            done.exception()  # looked at, so that asyncio does not complain
        self._sessions.writes_ended(self._session)


def _end(limit: asyncio.Timeout) -> None:
    """Ends a wait now; one that just ends by itself cannot be changed any more."""
    if not limit.expired():
        limit.reschedule(0.0)


def _ended(error: BatonError) -> BatonError:
    """What to tell the sender. The reader of the tokens may have noticed its silence first."""
    return (
        error
        if isinstance(error, Stalled)
        else StaleEpoch(f"the reservation ended: {error.message}")
    )
