"""Pushes one prompt's KV to the decode worker that reserved room for it, while it is computed.

Chunks go out as blocks become ready, as many as the receiver has given credit for. The push ends
with the manifest and the receiver's commit. Anything else is an error, and the receiver has then
changed nothing that a reader can see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import xxhash

from baton.core.clock import Clock
from baton.core.errors import BatonError, InvalidRequest, KvTransferLost, Stalled
from baton.core.handoff.frames import (
    Committed,
    KvChunk,
    KvEncoding,
    Manifest,
    Opening,
    SignOfLife,
    Span,
)
from baton.core.handoff.outgoing import Outgoing
from baton.core.handoff.verification import Ledger
from baton.core.hashing import tokens_hash
from baton.core.sampling import TokenLogprob
from baton.core.sequence import SequenceSpec
from baton.handoff.kv_store import KvStore
from baton.handoff.push_stream import PushStream
from baton.wire.prefill import PrefillDone, PushTarget

_MAX_SIGN_OF_LIFE_INTERVAL_S = 2.0
_LAST_WORD_S = 1.0
_MIN_PIECE_BYTES = 4 << 20
_NUM_PIECES = 4
"""Few large chunks cost fewer switches between threads; several let both sides work at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport(PrefillDone):
    """A committed push, with what only its sender knows."""

    transport: str
    """What carried its bytes."""
    began_at_s: float
    """First chunk's write, `Clock.now()` seconds."""
    starved_s: float
    """Part of the time spent waiting for credit."""

    @property
    def ended_at_s(self) -> float:
        """The commit's acknowledgement."""
        return self.began_at_s + self.transfer_s

    @property
    def active_s(self) -> float:
        """Time in which KV was on its way: what a transfer rate divides by."""
        return self.transfer_s - self.idle_s


@dataclass(frozen=True, slots=True)
class _ChosenToken:
    token_id: int
    logprob: TokenLogprob | None
    at_s: float


@dataclass(frozen=True, slots=True)
class SenderParts:
    """What all pushes of a worker share."""

    store: KvStore
    readers: Executor
    """Threads that read KV."""
    clock: Clock
    progress_timeout_s: float
    """How long the receiver may be silent before the push fails."""
    encoding: KvEncoding = KvEncoding.NATIVE


class PushSender:
    """One push. `run` does it; `ready` and `finish` report how far the computation is."""

    def __init__(
        self,
        parts: SenderParts,
        spec: SequenceSpec,
        target: PushTarget,
        connect: Callable[[], PushStream],
    ) -> None:
        """Connects when it runs.

        Raises:
            InvalidRequest: the target names more cached blocks than the prompt has.
        """
        self._parts = parts
        self._clock = parts.clock
        self._progress_timeout_s = parts.progress_timeout_s
        self._spec = spec
        self._target = target
        self._connect = connect
        self._layout = parts.store.fingerprint.layout
        self._num_blocks = -(-len(spec.token_ids) // self._layout.block_size)
        if target.num_cached_blocks > self._num_blocks:
            raise InvalidRequest(
                f"target.num_cached_blocks is {target.num_cached_blocks}, and the prompt has "
                f"{self._num_blocks} blocks"
            )
        self._outgoing = Outgoing(self._layout, target.num_cached_blocks, self._num_blocks)
        self._first: _ChosenToken | None = None
        self._num_credits = 0
        self._committed: Committed | None = None
        self._failure: BatonError | None = None
        self._news = asyncio.Event()
        self._sent = Ledger(xxhash.xxh3_64_intdigest)
        self._began_at_s = 0.0
        self._starved_s = 0.0
        self._idle_s = 0.0

    def ready(self, num_blocks: int) -> None:
        """The first `num_blocks` blocks can be read."""
        self._outgoing.blocks_ready(num_blocks)
        self._news.set()

    def layers_ready(self, num_blocks: int, layer_end: int) -> None:
        """Of the first `num_blocks` blocks, the layers before `layer_end` can be read."""
        self._outgoing.layers_ready(num_blocks, layer_end)
        self._news.set()

    def finish(self, token_id: int, logprob: TokenLogprob | None, at_s: float) -> None:
        """All blocks can be read, and this is the first token."""
        self._first = _ChosenToken(token_id, logprob, at_s)
        self.ready(self._num_blocks)

    async def run(self, request_id: str, attempt: int, worker_id: str) -> PushReport:
        """Pushes everything, and waits for the commit.

        Raises:
            BatonError: what the receiver says, KvTransferLost, or Stalled.
        """
        call = self._connect()
        reader = asyncio.create_task(self._read(call))
        try:
            opening = Opening(
                self._target.reservation_id,
                request_id,
                attempt,
                self._target.epoch,
                self._parts.store.fingerprint,
                worker_id,
                encoding=self._parts.encoding,
            )
            try:
                async with self._clock.timeout(self._progress_timeout_s):
                    await call.open(opening)
                return await self._send(call)
            except TimeoutError:
                raise Stalled(
                    f"decode worker {self._target.worker_id} took nothing for "
                    f"{self._progress_timeout_s:g} s"
                ) from None
            except KvTransferLost as error:
                raise await self._last_word(reader, error) from error
        finally:
            call.cancel()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, call: PushStream) -> None:
        """Takes the receiver's answers, to the last one."""
        try:
            while self._committed is None:
                answer = await call.read()
                if isinstance(answer, Committed):
                    self._committed = answer
                else:
                    self._num_credits += answer.num_chunks
                self._news.set()
        except BatonError as error:
            self._failure = error
            self._news.set()

    async def _last_word(self, reader: asyncio.Task[None], error: BatonError) -> BatonError:
        """The receiver's own reason for ending the push, where it gave one."""
        await asyncio.wait({reader}, timeout=_LAST_WORD_S)
        return self._failure or error

    async def _send(self, call: PushStream) -> PushReport:
        block_start = self._target.num_cached_blocks
        # The first credit also settles the transport.
        await self._until(lambda: self._num_credits > 0)
        num_bytes = self._layout.block_bytes * (self._num_blocks - block_start)
        piece_bytes = max(_MIN_PIECE_BYTES, num_bytes // _NUM_PIECES)
        while not self._outgoing.is_empty:
            span = self._outgoing.take(min(piece_bytes, call.max_chunk_bytes))
            if span is None:
                await self._wait_for_computation(call)
            else:
                await self._send_chunk(call, span)
        while self._first is None:
            await self._wait_for_computation(call)
        await call.send(self._manifest(self._first, block_start))
        await call.end()
        await self._until(lambda: self._committed is not None)
        ended_at_s = self._clock.now()
        return PushReport(
            transport=call.transport,
            num_bytes=self._sent.num_bytes,
            num_blocks=self._num_blocks - block_start,
            num_chunks=self._sent.num_chunks,
            began_at_s=self._began_at_s,
            transfer_s=ended_at_s - self._began_at_s,
            exposed_s=max(0.0, ended_at_s - max(self._began_at_s, self._first.at_s)),
            starved_s=self._starved_s,
            idle_s=self._idle_s,
        )

    async def _send_chunk(self, call: PushStream, span: Span) -> None:
        waits_since_s = self._clock.now()
        await self._until(lambda: self._num_credits > 0)
        now = self._clock.now()
        self._num_credits -= 1
        if self._began_at_s:
            self._starved_s += now - waits_since_s
        else:
            self._began_at_s = now
        sequence = self._sent.num_chunks
        payload = call.room(sequence, span.num_bytes(self._parts.encoding.layout(self._layout)))
        reading = asyncio.get_running_loop().run_in_executor(
            self._parts.readers, self._read_kv, span, payload
        )
        try:
            checksum = await asyncio.shield(reading)
        finally:
            await asyncio.wait({reading})  # Else it might still write into another push's room.
        chunk = KvChunk(self._target.epoch, sequence, span, checksum)
        self._sent.add(payload.nbytes, checksum)
        async with self._clock.timeout(self._progress_timeout_s):
            await call.chunk(chunk, payload)

    def _read_kv(self, span: Span, out: memoryview) -> int:
        """Puts KV into `out` as it is sent; returns its checksum."""
        self._parts.store.read(self._spec.seq_id, span, self._parts.encoding, out)
        return xxhash.xxh3_64_intdigest(out)

    def _manifest(self, first: _ChosenToken, block_start: int) -> Manifest:
        return Manifest(
            epoch=self._target.epoch,
            num_chunks=self._sent.num_chunks,
            num_bytes=self._sent.num_bytes,
            block_start=block_start,
            num_blocks=self._num_blocks - block_start,
            num_tokens=len(self._spec.token_ids),
            tokens_hash=tokens_hash(self._spec.token_ids),
            checksum=self._sent.checksum,
            first_token_id=first.token_id,
            first_logprob=first.logprob,
        )

    async def _wait_for_computation(self, call: PushStream) -> None:
        """Waits for progress of the computation; without any, sends a sign of life."""
        interval_s = min(_MAX_SIGN_OF_LIFE_INTERVAL_S, self._progress_timeout_s / 3)
        waits_since_s = self._clock.now()
        if not await self._has_news(interval_s):
            async with self._clock.timeout(self._progress_timeout_s):
                await call.send(SignOfLife(self._target.epoch))
        if self._began_at_s:
            self._idle_s += self._clock.now() - waits_since_s

    async def _until(self, is_true: Callable[[], bool]) -> None:
        """Waits for the receiver.

        Raises:
            Stalled: it said nothing for `progress_timeout_s`.
        """
        while not is_true():
            if not await self._has_news(self._progress_timeout_s):
                raise Stalled(
                    f"decode worker {self._target.worker_id} said nothing for "
                    f"{self._progress_timeout_s:g} s"
                )
        self._raise_failure()

    async def _has_news(self, timeout_s: float) -> bool:
        """False if nothing happened in time. Raises the error with which the receiver ended it."""
        self._raise_failure()
        self._news.clear()
        try:
            async with self._clock.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return False
        self._raise_failure()
        return True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
