"""Callers without a transport, for simulations and tests: they call a server in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from baton.core.clock import Clock
from baton.core.errors import DeadlineExceeded
from baton.core.hashing import KvLayout
from baton.wire.cache import PIN_TIMEOUT_S, CacheBlock, CacheServer
from baton.wire.inference.pins import PinnedPrefix


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
