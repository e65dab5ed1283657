"""Callers without a transport, for simulations and tests: they call a server in this process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Generic, TypeVar

from baton.core.clock import Clock
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    ErrorReason,
    NoWorker,
    WorkerDraining,
    error_for,
)
from baton.core.hashing import KvLayout
from baton.core.output import TokenBatch
from baton.wire.cache import PIN_TIMEOUT_S, CacheBlock, CacheServer
from baton.wire.decode import DecodeServer, KvReservation, LeaseRenewal
from baton.wire.errors import CATALOGUE, public_message
from baton.wire.inference.pins import PinnedPrefix
from baton.wire.orders import AttemptOrder, EmbedOrder
from baton.wire.prefill import PrefillEvent, PrefillServer, PromptVector, PushTarget
from baton.wire.streams import AnswerStream, Silent

ValueT = TypeVar("ValueT")
_WINDOW = 16
"""Answers that a server may be ahead of its reader."""


@asynccontextmanager
async def _deadline(clock: Clock, timeout_s: float) -> AsyncGenerator[None, None]:
    """Bounds a call that is made without a transport.

    Raises:
        DeadlineExceeded: the block took longer.
    """
    try:
        async with clock.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(f"no answer within {timeout_s:.1f} s") from error


class DirectCache:
    """Implements CacheCaller on a CacheServer in this process, without a transport."""

    def __init__(self, address: str, server: CacheServer, clock: Clock) -> None:
        self.address = address
        self._server = server
        self._clock = clock

    async def num_stored(self, hashes: Sequence[bytes], *, timeout_s: float) -> int:
        return self._server.match(hashes).num_stored_blocks

    async def fetch(
        self, hashes: Sequence[bytes], layout: KvLayout, *, timeout_s: float
    ) -> AsyncGenerator[CacheBlock, None]:
        ends_at_s = self._clock.now() + timeout_s
        async with aclosing(self._server.fetch(hashes)) as blocks:
            while True:
                async with _deadline(self._clock, ends_at_s - self._clock.now()):
                    block = await anext(blocks, None)
                if block is None:
                    return
                yield CacheBlock(block.block_hash, block.layout, block.checksum, block.payload)

    async def store(self, blocks: AsyncIterator[CacheBlock], *, timeout_s: float) -> int:
        async with _deadline(self._clock, timeout_s):
            return (await self._server.store(blocks)).num_stored

    async def answer(self, key: bytes, *, timeout_s: float) -> bytes:
        return self._server.answer(key) or b""

    async def store_answer(self, key: bytes, answer: bytes, *, timeout_s: float) -> bool:
        return self._server.store_answer(key, answer)

    async def pin(
        self, hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str
    ) -> PinnedPrefix:
        async with _deadline(self._clock, PIN_TIMEOUT_S):
            return await self._server.pin(hashes, block_bytes, ttl_s, label)

    async def unpin(self, pin_id: str) -> bool:
        async with _deadline(self._clock, PIN_TIMEOUT_S):
            return await self._server.unpin(pin_id)

    async def pins(self) -> list[PinnedPrefix]:
        return self._server.pins()


async def direct(work: Coroutine[Any, Any, ValueT], timeout_s: float, clock: Clock) -> ValueT:
    """The answer of a unary call; leaving this early cancels the server's side.

    Raises:
        DeadlineExceeded: no answer within the time.
        BatonError: the server's error, as a caller over gRPC sees it.
    """
    task = asyncio.create_task(work)
    try:
        async with clock.timeout(timeout_s):
            await asyncio.wait({task})
    except TimeoutError:
        raise DeadlineExceeded(f"no answer within {timeout_s:.1f} s") from None
    finally:
        task.cancel()
    if (error := _error_of(task)) is not None:
        raise error
    return task.result()


class DirectStream(Generic[ValueT]):
    """An AnswerStream of a generator, which runs in a task for the server's side."""

    def __init__(
        self, values: AsyncGenerator[ValueT, None], timeout_s: float, peer: str, clock: Clock
    ) -> None:
        self._clock = clock
        self._ends_at_s = clock.now() + timeout_s
        self._peer = peer
        self._is_cancelled = False
        self._values: deque[ValueT] = deque()
        self._room = asyncio.Semaphore(_WINDOW)
        self._has_news = asyncio.Event()
        self._server = asyncio.create_task(self._serve(values))
        self._server.add_done_callback(lambda _: self._has_news.set())

    async def next(self, timeout_s: float) -> ValueT | None:
        """See AnswerStream."""
        left_s = max(0.0, self._ends_at_s - self._clock.now())
        try:
            async with self._clock.timeout(min(timeout_s, left_s)):
                while not self._values and not self._server.done():
                    self._has_news.clear()
                    await self._has_news.wait()
        except TimeoutError:
            self.cancel()
            if left_s < timeout_s:
                raise DeadlineExceeded("the call took too long") from None
            raise Silent(f"{self._peer} sent nothing for {timeout_s:.1f} s") from None
        if self._is_cancelled:
            raise NoWorker(f"the connection to {self._peer} was closed")
        if self._values:
            self._room.release()
            return self._values.popleft()
        if (error := _error_of(self._server)) is not None:
            raise error
        return None

    async def drain(self, timeout_s: float) -> None:
        """See AnswerStream."""
        try:
            while await self.next(timeout_s) is not None:
                pass
        except BatonError:
            self.cancel()

    def cancel(self) -> None:
        """See AnswerStream."""
        self._is_cancelled = self._is_cancelled or not self._server.done()
        self._server.cancel()

    async def _serve(self, values: AsyncGenerator[ValueT, None]) -> None:
        async with aclosing(values):
            async for value in values:
                await self._room.acquire()
                self._values.append(value)
                self._has_news.set()


def _error_of(task: asyncio.Task[Any]) -> BatonError | None:
    """The error that a finished call ended with, as its caller sees it."""
    if task.cancelled():
        return WorkerDraining("the peer ended the call")
    error = task.exception()
    if error is None:
        return None
    if isinstance(error, BatonError):
        return error_for(error.reason, public_message(error), retry_after_s=error.retry_after_s)
    return error_for(ErrorReason.INTERNAL, CATALOGUE[ErrorReason.INTERNAL].public_text)


class DirectDecodeCaller:
    """A DecodeCaller of a server in the same process."""

    def __init__(self, server: DecodeServer, peer: str, clock: Clock) -> None:
        self._server = server
        self._peer = peer
        self._clock = clock

    async def reserve(self, order: AttemptOrder, timeout_s: float) -> KvReservation:
        """See DecodeCaller."""
        return await direct(self._server.reserve(order), timeout_s, self._clock)

    def decode(
        self, reservation: KvReservation, *, local_prefill: bool, timeout_s: float
    ) -> AnswerStream[TokenBatch]:
        """See DecodeCaller."""
        batches = self._server.decode(
            reservation.reservation_id, reservation.epoch, local_prefill=local_prefill
        )
        return DirectStream(batches, timeout_s, self._peer, self._clock)

    async def release(
        self, *, reservation_id: str = "", request_id: str = "", reason: str, timeout_s: float
    ) -> int:
        """See DecodeCaller."""
        call = self._server.release(reservation_id, request_id, reason)
        return await direct(call, timeout_s, self._clock)

    async def renew_leases(self, reservation_ids: Sequence[str], timeout_s: float) -> LeaseRenewal:
        """See DecodeCaller."""
        return await direct(self._server.renew_leases(reservation_ids), timeout_s, self._clock)


class DirectPrefillCaller:
    """A PrefillCaller of a server in the same process."""

    def __init__(self, server: PrefillServer, peer: str, clock: Clock) -> None:
        self._server = server
        self._peer = peer
        self._clock = clock

    def prefill(
        self, order: AttemptOrder, target: PushTarget, timeout_s: float
    ) -> AnswerStream[PrefillEvent]:
        """See PrefillCaller."""
        events = self._server.prefill(order, target)
        return DirectStream(events, timeout_s, self._peer, self._clock)

    async def embed(self, order: EmbedOrder, timeout_s: float) -> PromptVector:
        """See PrefillCaller."""
        return await direct(self._server.embed(order), timeout_s, self._clock)

    async def release(self, request_id: str, attempt: int, reason: str, timeout_s: float) -> int:
        """See PrefillCaller."""
        return await direct(self._server.release(request_id, attempt), timeout_s, self._clock)
